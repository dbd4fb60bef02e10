/* How it works. A placement says which experts stay in memory (kept) and which come through the ring (streamed). It is
 * turned into jobs, in the order in which a pass needs them: of each layer first the ranges, then the kept experts,
 * then the streamed ones. Job j of pass c has the number c * n_jobs + j, and the thread works at one number after
 * another, up to the end of the pass after this one.
 *
 * A job that stays (ranges, kept experts) is done once. Where its read fails it is still not there, and a later pass
 * has it again:
 *
 *     not there  --taken: next++-->  being read  --mark_there-->  there
 *         ^                                                         |
 *         +-- let_go: another placement does not keep the expert ---+
 *
 * A streamed job is done in every pass, in slot `filled % n_slots` of the ring. Slots go round:
 *
 *     free  --taken: next++-->  being filled  --filled++-->  full  --next_portion: taken++-->  in use
 *      ^                             |                         |                                  |
 *      +-- the read fails -----------+                         |                                  |
 *      +-- drop_stale: the pass is past this job --------------+                                  |
 *      +-- the pass asks for the next portion, or ends: released = taken -------------------------+
 *
 * So the slots [released, taken) are in use, [taken, filled) are full, and the thread waits while filled - released is
 * n_slots. After a failure the thread waits too: the next pass frees all slots, and has its own jobs read.
 */
#include "stream.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

enum {
    TRIES = 8,              /* a read fails after so many tries in a row without a new byte */
    LARGE_PAGE = 1 << 21,
    PORTION = 16, /* experts in memory that are returned at a time; between two portions new ones may arrive */
};

/* Bytes of the file that are read together; of a matrix, those of experts [from, to). */
typedef struct run {
    int32_t part, matrix, from, to;
    int64_t offset, bytes;
    int64_t place; /* in a buffer, of the granule that offset lies in */
} run;

/* What the thread does at a time: experts, or ranges (count 0), of one layer. */
typedef struct job {
    int32_t layer;
    bool streamed, done; /* done: what stays, and is there */
    int32_t first, count; /* of s->list */
    int32_t run, n_runs; /* of s->runs */
} job;

struct stream {
    /* The file's layout and how it is read: set once. */
    int32_t n_layer, n_expert, n_parts, n_ranges;
    uint8_t **homes;          /* [n_parts] */
    char **names;             /* [n_parts] */
    stream_range *ranges;     /* [n_ranges] in order of layer, part, offset */
    stream_matrix *matrices;  /* [n_layer][STREAM_MATRICES] */
    stream_reader reader;
    int64_t granule;

    /* The placement that stream_place asks for; the next pass makes it hold. */
    bool *asked;              /* [n_layer][n_expert] experts to keep */
    int64_t asked_bytes;      /* of a slot */
    int32_t asked_slots;
    bool placed;              /* what was asked for holds */

    /* The placement that holds, and what of it is in memory. */
    bool *keep;               /* [n_layer][n_expert] */
    bool *there;              /* [n_layer][n_expert] kept experts that were read */
    bool *range_there;        /* [n_ranges] */
    const uint8_t **at;       /* [n_layer][STREAM_MATRICES][n_expert] addresses of matrices */

    /* Its jobs, in the order of a pass. */
    job *jobs;
    run *runs;                /* of all jobs */
    int32_t *list;            /* experts of all jobs */
    int32_t n_jobs, n_runs, n_list;
    /* [n_layer + 2] of layer - 1; its ranges come first, then experts that stay, then the others */
    int32_t *first_job;

    /* Its ring. */
    uint8_t *ring;            /* [n_slots][slot_bytes] */
    size_t ring_bytes;
    int64_t slot_bytes;
    int32_t n_slots;
    int64_t *sequence;        /* [n_slots] the number of the job that filled each */

    /* From here to the traffic: shared with the thread, guarded by the mutex. */
    os_mutex *mutex;
    os_thread *thread;        /* NULL before the first pass, and in a forked process */
    atomic_bool closing;      /* also read without the mutex, between two reads of the file */
    bool busy;                /* a pass has its turn */
    bool reading;             /* the thread reads a job, without the mutex */
    bool failed;              /* a read failed: nothing is read before the next pass */
    dg_error error;           /* with what */

    /* How far reading and the pass have come. */
    int64_t next;             /* number of the job that the thread takes next */
    int64_t cycle;            /* of the pass; -1 before the first */
    int32_t limit;            /* layers of this pass whose experts are used */
    int64_t filled, taken, released; /* slots so far, see above */

    /* Which experts the pass uses of the layer that it is at: others are not read. */
    bool *hits;               /* [n_expert] of hits_layer */
    int32_t hits_layer;       /* -1: not known */

    dg_traffic traffic;

    /* The thread's own. */
    bool *wanted;             /* [n_expert] its copy of hits */
    uint8_t *ends;            /* two granules */

    /* The pass's own: the jobs of the layer that it has yet to take, of kept experts and of streamed ones. */
    int32_t at_home, end_home, at_ring, end_ring;
};

/* ---- Sizes ---- */

static int64_t down(const stream *s, int64_t n) { return n / s->granule * s->granule; }
static int64_t up(const stream *s, int64_t n) { return down(s, n + s->granule - 1); }
static const stream_matrix *matrix_of(const stream *s, int32_t l, int32_t i) {
    return &s->matrices[l * STREAM_MATRICES + i];
}
static int64_t number_of(const stream *s, int32_t l, int32_t expert) { return (int64_t)l * s->n_expert + expert; }
static int64_t run_room(const stream *s, const run *r) { return up(s, r->offset + r->bytes) - down(s, r->offset); }

int64_t stream_room(int64_t bytes) {
    const int64_t granule = os_granule();
    return (bytes + granule - 1) / granule * granule + granule;
}

int64_t stream_block_bytes(const stream *s) {
    int64_t most = 0;
    for (int32_t l = 0; l < s->n_layer; l++) {
        int64_t sum = 0;
        for (int32_t i = 0; i < STREAM_MATRICES; i++)
            if (matrix_of(s, l, i)->bytes) sum += stream_room(matrix_of(s, l, i)->bytes);
        if (sum > most) most = sum;
    }
    return most;
}

const uint8_t *const *stream_at(const stream *s, int32_t l, int32_t matrix) {
    return s->at + ((int64_t)l * STREAM_MATRICES + matrix) * s->n_expert;
}

static void set_address(stream *s, int32_t l, int32_t matrix, int32_t expert, const uint8_t *to) {
    s->at[((int64_t)l * STREAM_MATRICES + matrix) * s->n_expert + expert] = to;
}

static uint8_t *home_of(const stream *s, int32_t file, int64_t offset) { return s->homes[file] + offset; }

/* ---- Plans ---- */

static void add_run(stream *s, run r) {
    if (r.bytes) s->runs[s->n_runs++] = r;
}

/* Computes the runs for experts list[first .. first + count) of a layer: neighbours in the file are one run, and runs
 * follow each other in a buffer. Returns their bytes in the buffer. write: whether to write them to s->runs. */
static int64_t lay_runs(stream *s, int32_t l, int32_t first, int32_t count, bool write) {
    int64_t place = 0;
    for (int32_t i = 0; i < STREAM_MATRICES; i++) {
        const stream_matrix *m = matrix_of(s, l, i);
        for (int32_t k = 0; m->bytes && k < count;) {
            const int32_t from = s->list[first + k];
            int32_t to = from;
            for (; k < count && s->list[first + k] == to; k++) to++;
            const run r = {
                .part = m->part,
                .matrix = i,
                .from = from,
                .to = to,
                .offset = m->offset + from * m->bytes,
                .bytes = (to - from) * m->bytes,
                .place = place,
            };
            place += run_room(s, &r);
            if (write) add_run(s, r);
        }
    }
    return place;
}

static void add_job(stream *s, int32_t l, bool streamed, bool done, int32_t first, int32_t count) {
    job *j = &s->jobs[s->n_jobs++];
    *j = (job){.layer = l, .streamed = streamed, .done = done, .first = first, .count = count, .run = s->n_runs};
    if (!done && count) lay_runs(s, l, first, count, true);
    j->n_runs = s->n_runs - j->run;
}

static void add_ranges(stream *s, int32_t l) {
    job *j = &s->jobs[s->n_jobs++];
    *j = (job){.layer = l, .done = true, .run = s->n_runs};
    for (int32_t i = 0; i < s->n_ranges; i++) {
        const stream_range *r = &s->ranges[i];
        if (r->layer != l || s->range_there[i]) continue;
        j->done = false;
        add_run(s,
                (run){.part = r->part, .matrix = -1, .from = i, .to = i + 1, .offset = r->offset, .bytes = r->bytes});
    }
    j->n_runs = s->n_runs - j->run;
}

/* Makes jobs for the experts of a list that are `kept` and `there` as given; a job has as many experts as fit. */
static void add_experts(stream *s, int32_t l, bool keep, bool there) {
    int32_t first = s->n_list;
    for (int32_t e = 0; e < s->n_expert; e++) {
        const int64_t i = number_of(s, l, e);
        if (s->keep[i] != keep || (keep && s->there[i] != there)) continue;
        s->list[s->n_list++] = e;
        const int32_t count = s->n_list - first;
        const bool full = keep ? count > PORTION : lay_runs(s, l, first, count, false) > s->slot_bytes;
        if (!full || count == 1) continue;
        add_job(s, l, !keep, there, first, count - 1);
        first = s->n_list - 1;
    }
    if (s->n_list > first) add_job(s, l, !keep, there, first, s->n_list - first);
}

/* Frees the memory of experts that no longer stay. */
static void let_go(stream *s) {
    for (int32_t l = 0; l < s->n_layer; l++)
        for (int32_t e = 0; e < s->n_expert; e++) {
            const int64_t n = number_of(s, l, e);
            if (!s->there[n] || s->keep[n]) continue;
            s->there[n] = false;
            for (int32_t i = 0; i < STREAM_MATRICES; i++) {
                const stream_matrix *m = matrix_of(s, l, i);
                const int64_t from = up(s, m->offset + e * m->bytes), to = down(s, m->offset + (e + 1) * m->bytes);
                if (!m->bytes || from >= to) continue;
                os_discard(home_of(s, m->part, from), (size_t)(to - from));
                os_small_pages(home_of(s, m->part, from), (size_t)(to - from));
            }
        }
}

/* Asks for large pages in memory that stays, where a whole large page fits. */
static void ask_large(stream *s) {
    for (int32_t j = 0; j < s->n_jobs; j++)
        for (int32_t r = s->jobs[j].run; !s->jobs[j].streamed && r < s->jobs[j].run + s->jobs[j].n_runs; r++) {
            const uintptr_t at = (uintptr_t)home_of(s, s->runs[r].part, s->runs[r].offset);
            const uintptr_t from = (at + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE,
                            to = (at + (uintptr_t)s->runs[r].bytes) / LARGE_PAGE * LARGE_PAGE;
            if (from < to) os_large_pages((void *)from, to - from);
        }
}

static int64_t resident(const stream *s) {
    int64_t sum = 0;
    for (int32_t i = 0; i < s->n_ranges; i++) sum += s->range_there[i] ? s->ranges[i].bytes : 0;
    for (int32_t l = 0; l < s->n_layer; l++)
        for (int32_t e = 0; e < s->n_expert; e++)
            for (int32_t i = 0; i < STREAM_MATRICES; i++)
                sum += s->there[number_of(s, l, e)] ? matrix_of(s, l, i)->bytes : 0;
    return sum;
}

/* Makes all jobs, by which experts stay and which were read already. The thread must not be reading. */
static bool make_jobs(stream *s) {
    memcpy(s->keep, s->asked, (size_t)s->n_layer * (size_t)s->n_expert * sizeof *s->keep);
    let_go(s);
    os_release(s->ring, s->ring_bytes);
    free(s->sequence);
    s->slot_bytes = s->asked_bytes;
    s->n_slots = s->asked_slots;
    s->ring = NULL;
    s->sequence = NULL;
    s->ring_bytes = (size_t)s->slot_bytes * (size_t)s->n_slots;
    if (s->n_slots) {
        s->ring = os_reserve(s->ring_bytes);
        s->sequence = calloc((size_t)s->n_slots, sizeof *s->sequence);
        if (!s->ring || !s->sequence) return false;
        os_large_pages(s->ring, s->ring_bytes);
    }
    s->n_jobs = s->n_runs = s->n_list = 0;
    for (int32_t l = -1; l < s->n_layer; l++) {
        s->first_job[l + 1] = s->n_jobs;
        add_ranges(s, l);
        if (l < 0) continue;
        add_experts(s, l, true, true);
        add_experts(s, l, true, false);
        add_experts(s, l, false, false);
        for (int32_t e = 0; e < s->n_expert; e++)
            for (int32_t i = 0; i < STREAM_MATRICES && s->keep[number_of(s, l, e)]; i++)
                if (matrix_of(s, l, i)->bytes)
                    set_address(s, l, i, e,
                                home_of(s, matrix_of(s, l, i)->part,
                                        matrix_of(s, l, i)->offset + e * matrix_of(s, l, i)->bytes));
    }
    s->first_job[s->n_layer + 1] = s->n_jobs;
    ask_large(s);
    s->filled = s->taken = s->released = 0;
    s->next = (s->cycle + 1) * s->n_jobs;
    s->traffic.resident = resident(s);
    s->traffic.ring = (int64_t)s->ring_bytes;
    s->placed = true;
    return true;
}

/* ---- The thread ---- */

/* Reads the whole granules that have bytes [offset, offset + bytes) of a part, to the address of the first granule. */
static int read_bytes(stream *s, int32_t file, int64_t offset, int64_t bytes, uint8_t *to, int64_t *total,
                      dg_error *error) {
    const int64_t begin = down(s, offset), end = up(s, offset + bytes), need = offset + bytes;
    int32_t tries = 0;
    for (int64_t at = begin; at < need;) {
        if (atomic_load(&s->closing)) return fail(error, DG_ERROR_STOPPED, "closed");
        const int64_t want = end - at < STREAM_PIECE ? end - at : STREAM_PIECE;
        const int64_t got = s->reader.read(s->reader.self, file, to + (at - begin), want, at);
        if (got < 0)
            return fail(error, DG_ERROR_SYSTEM, "%s: cannot read %lld bytes at %lld: %s", s->names[file],
                        (long long)want, (long long)at, strerror((int)-got));
        if (got == 0)
            return fail(error, DG_ERROR_SYSTEM,
                        "%s: truncated while it was in use: it ends at byte %lld, a weight at %lld", s->names[file],
                        (long long)at, (long long)need);
        *total += got;
        const int64_t past = at + got >= need ? need : down(s, at + got); /* direct reads go on at a whole granule */
        tries = past > at ? 0 : tries + 1;
        if (tries == TRIES)
            return fail(error, DG_ERROR_SYSTEM, "%s: reads at byte %lld bring %lld of %lld bytes, again and again",
                        s->names[file], (long long)at, (long long)got, (long long)want);
        at = past;
    }
    return DG_OK;
}

/* Reads less than two granules of a part to their place, without writing to bytes before and after them, which other
 * threads may be reading. */
static int read_end(stream *s, int32_t file, int64_t offset, int64_t bytes, int64_t *total, dg_error *error) {
    if (!bytes) return DG_OK;
    const int status = read_bytes(s, file, offset, bytes, s->ends, total, error);
    if (status == DG_OK) memcpy(home_of(s, file, offset), s->ends + (offset - down(s, offset)), (size_t)bytes);
    return status;
}

static int read_home(stream *s, int32_t file, int64_t offset, int64_t bytes, int64_t *total, dg_error *error) {
    const int64_t end = offset + bytes, first = up(s, offset), last = down(s, end);
    if (first >= last) return read_end(s, file, offset, bytes, total, error);
    int status = read_end(s, file, offset, first - offset, total, error);
    if (status == DG_OK) status = read_bytes(s, file, first, last - first, home_of(s, file, first), total, error);
    return status == DG_OK ? read_end(s, file, last, end - last, total, error) : status;
}

/* Reads one run, to its place in the buffer `base` or to its home; into a buffer only the experts that are used, if it
 * is known which. */
static int read_run(stream *s, const run *r, uint8_t *base, const bool *wanted, int64_t *total, dg_error *error) {
    if (!base) return read_home(s, r->part, r->offset, r->bytes, total, error);
    if (!wanted) return read_bytes(s, r->part, r->offset, r->bytes, base + r->place, total, error);
    const int64_t each = r->bytes / (r->to - r->from);
    int status = DG_OK;
    for (int32_t e = r->from; e < r->to && status == DG_OK;) {
        int32_t to = e;
        while (to < r->to && wanted[to]) to++;
        if (to > e) {
            const int64_t offset = r->offset + (e - r->from) * each;
            status = read_bytes(s, r->part, offset, (to - e) * each,
                                base + r->place + (down(s, offset) - down(s, r->offset)), total, error);
        }
        e = to + (to == e);
    }
    return status;
}

static int read_job(stream *s, const job *j, uint8_t *base, const bool *wanted, int64_t *total, dg_error *error) {
    int status = DG_OK;
    for (int32_t i = j->run; i < j->run + j->n_runs && status == DG_OK; i++) {
        status = read_run(s, &s->runs[i], base, wanted, total, error);
        if (status == DG_OK && (i + 1 == j->run + j->n_runs || s->runs[i + 1].part != s->runs[i].part))
            status = s->reader.check(s->reader.self, s->runs[i].part, error);
    }
    return status;
}

/* The next job for the thread, and moves s->next to it; NULL: there is none now, or no buffer is free. */
static job *job_to_do(stream *s) {
    if (s->failed || s->cycle < 0) return NULL;
    for (int32_t seen = 0; seen <= s->n_jobs; seen++) {
        const int64_t cycle = s->next / s->n_jobs;
        job *j = &s->jobs[s->next % s->n_jobs];
        if (cycle > s->cycle + 1) return NULL;
        if (cycle == s->cycle && j->layer >= s->limit && j->count) {
            s->next = (cycle + 1) * s->n_jobs;
            continue;
        }
        if (j->streamed) return s->filled - s->released < s->n_slots ? j : NULL;
        if (!j->done) return j;
        s->next++;
    }
    return NULL;
}

static void mark_there(stream *s, job *j) {
    j->done = true;
    for (int32_t i = 0; i < j->count; i++) s->there[number_of(s, j->layer, s->list[j->first + i])] = true;
    for (int32_t i = 0; !j->count && i < j->n_runs; i++) s->range_there[s->runs[j->run + i].from] = true;
    for (int32_t i = j->run; i < j->run + j->n_runs; i++) s->traffic.resident += s->runs[i].bytes;
}

static void work(void *arg) {
    stream *s = arg;
    os_mutex_lock(s->mutex);
    while (!atomic_load(&s->closing)) {
        job *j = job_to_do(s);
        if (!j) {
            os_mutex_wait(s->mutex);
            continue;
        }
        const int64_t sequence = s->next++;
        uint8_t *base = j->streamed ? s->ring + s->filled % s->n_slots * s->slot_bytes : NULL;
        const bool known = j->streamed && sequence / s->n_jobs == s->cycle && s->hits_layer == j->layer;
        if (known) memcpy(s->wanted, s->hits, (size_t)s->n_expert * sizeof *s->wanted);
        s->reading = true;
        os_mutex_unlock(s->mutex);
        int64_t total = 0;
        dg_error error = {0};
        const uint64_t began = os_nanoseconds();
        const int status = read_job(s, j, base, known ? s->wanted : NULL, &total, &error);
        const double took = 1e-9 * (double)(os_nanoseconds() - began);
        os_mutex_lock(s->mutex);
        s->traffic.reading += took;
        s->reading = false;
        s->traffic.read += total;
        if (j->n_runs && s->reader.copies && s->reader.copies(s->reader.self, s->runs[j->run].part))
            s->traffic.copied += total;
        if (status != DG_OK) {
            s->failed = true;
            s->error = error;
        } else if (j->streamed) s->sequence[s->filled++ % s->n_slots] = sequence;
        else mark_there(s, j);
        os_mutex_wake_all(s->mutex);
    }
    os_mutex_unlock(s->mutex);
}

/* ---- Passes ---- */

/* Waits until the thread or a pass reports a change, and adds the time to the traffic. */
static void wait_for_thread(stream *s) {
    const uint64_t began = os_nanoseconds();
    os_mutex_wake_all(s->mutex);
    os_mutex_wait(s->mutex);
    s->traffic.waited += 1e-9 * (double)(os_nanoseconds() - began);
}

/* Frees the buffers that were filled for jobs before this one: of a pass that ended early, or of a layer whose experts
 * were not used. */
static void drop_stale(stream *s, int32_t before) {
    while (s->taken < s->filled && s->sequence[s->taken % s->n_slots] < s->cycle * s->n_jobs + before)
        s->released = ++s->taken;
}

/* Resets the state in a forked process: it has no reading thread, and no pass is running. Reads that were running at
 * the fork are repeated. */
static void begin_anew(stream *s) {
    os_thread_join(s->thread);
    s->thread = NULL;
    s->reading = s->busy = false;
    s->failed = true;
}

void stream_begin(stream *s, int32_t layers) {
    os_mutex_lock(s->mutex);
    if (s->thread && !os_thread_runs(s->thread)) begin_anew(s);
    while (s->busy) os_mutex_wait(s->mutex);
    s->busy = true;
    if (!s->placed || s->failed) {
        while (s->reading) os_mutex_wait(s->mutex);
        s->failed = false;
        s->taken = s->released = s->filled;
        s->next = (s->cycle + 1) * s->n_jobs;
        if (!s->placed && !make_jobs(s)) {
            s->failed = true;
            fail(&s->error, DG_ERROR_SYSTEM, "no memory for a ring of %lld bytes",
                 (long long)s->slot_bytes * s->n_slots);
        }
    }
    if (!s->failed && !s->thread) s->thread = os_thread_start(work, s);
    if (!s->failed && !s->thread) {
        s->failed = true;
        fail(&s->error, DG_ERROR_SYSTEM, "cannot start a thread that reads ahead");
    }
    s->cycle++;
    s->limit = layers;
    s->hits_layer = -1;
    if (s->next < s->cycle * s->n_jobs) s->next = s->cycle * s->n_jobs;
    drop_stale(s, 0);
    os_mutex_wake_all(s->mutex);
    os_mutex_unlock(s->mutex);
}

bool stream_layer(stream *s, int32_t l) {
    os_mutex_lock(s->mutex);
    if (!s->failed) drop_stale(s, s->first_job[l + 1]);
    while (!s->failed && !s->jobs[s->first_job[l + 1]].done) wait_for_thread(s);
    const bool there = !s->failed;
    os_mutex_unlock(s->mutex);
    return there;
}

static int32_t give(stream *s, const job *j, int32_t *out, int32_t count) {
    memcpy(out + count, s->list + j->first, (size_t)j->count * sizeof *out);
    return count + j->count;
}

/* Sets the addresses of a job's experts in its buffer. */
static void set_addresses(stream *s, const job *j, const uint8_t *base) {
    for (int32_t i = j->run; i < j->run + j->n_runs; i++) {
        const run *r = &s->runs[i];
        const int64_t each = r->bytes / (r->to - r->from);
        for (int32_t e = r->from; e < r->to; e++)
            set_address(s, j->layer, r->matrix, e,
                        base + r->place + (r->offset - down(s, r->offset)) + (e - r->from) * each);
    }
}

static int32_t next_portion(void *self, int32_t *out) {
    stream *s = self;
    int32_t count = 0;
    os_mutex_lock(s->mutex);
    s->released = s->taken; /* what was given before is done with */
    os_mutex_wake_all(s->mutex);
    while (!s->failed && count == 0) {
        drop_stale(s, s->at_ring);
        const int32_t most = s->n_slots / 2 ? s->n_slots / 2 : 1;
        for (int32_t k = 0; k < most && s->at_ring < s->end_ring && s->taken < s->filled; k++) {
            const job *j = &s->jobs[s->at_ring++];
            set_addresses(s, j, s->ring + s->taken++ % s->n_slots * s->slot_bytes);
            count = give(s, j, out, count);
        }
        if (count == 0 && s->at_home < s->end_home && s->jobs[s->at_home].done)
            count = give(s, &s->jobs[s->at_home++], out, count);
        if (count == 0 && s->at_home == s->end_home && s->at_ring == s->end_ring) break;
        if (count == 0) wait_for_thread(s);
    }
    if (s->failed) count = 0;
    os_mutex_unlock(s->mutex);
    return count;
}

expert_feed stream_experts(stream *s, int32_t l, const int32_t *experts, int64_t n) {
    os_mutex_lock(s->mutex);
    memset(s->hits, 0, (size_t)s->n_expert * sizeof *s->hits);
    for (int64_t i = 0; i < n; i++) s->hits[experts[i]] = true;
    s->hits_layer = l;
    s->at_home = s->first_job[l + 1] + 1;
    s->end_ring = s->first_job[l + 2];
    s->at_ring = s->at_home;
    while (s->at_ring < s->end_ring && !s->jobs[s->at_ring].streamed) s->at_ring++;
    s->end_home = s->at_ring;
    os_mutex_unlock(s->mutex);
    return (expert_feed){next_portion, s};
}

int stream_end(stream *s, dg_error *error) {
    os_mutex_lock(s->mutex);
    s->released = s->taken;
    s->hits_layer = -1;
    const int64_t first = (s->cycle + 1) * s->n_jobs;
    if (s->next < first) s->next = first; /* jobs that this pass skipped are not read */
    int status = DG_OK;
    if (s->failed) status = fail(error, (dg_status)s->error.status, "%s", s->error.message);
    else s->traffic.passes++;
    s->busy = false;
    os_mutex_wake_all(s->mutex);
    os_mutex_unlock(s->mutex);
    return status;
}

void stream_traffic(stream *s, dg_traffic *out) {
    os_mutex_lock(s->mutex);
    *out = s->traffic;
    out->experts = out->streamed = 0;
    for (int64_t i = 0; i < (int64_t)s->n_layer * s->n_expert; i++) {
        int64_t bytes = 0;
        for (int32_t k = 0; k < STREAM_MATRICES; k++) bytes += matrix_of(s, (int32_t)(i / s->n_expert), k)->bytes;
        out->experts += bytes;
        out->streamed += s->keep[i] ? 0 : bytes;
    }
    os_mutex_unlock(s->mutex);
}

/* ---- Beginning and end ---- */

void stream_place(stream *s, const bool *keep, int64_t slot_bytes, int32_t n_slots) {
    os_mutex_lock(s->mutex);
    const size_t size = (size_t)s->n_layer * (size_t)s->n_expert * sizeof *keep;
    if (memcmp(s->asked, keep, size) != 0 || s->asked_bytes != down(s, slot_bytes) || s->asked_slots != n_slots)
        s->placed = false;
    memcpy(s->asked, keep, size);
    s->asked_bytes = down(s, slot_bytes);
    s->asked_slots = n_slots;
    os_mutex_unlock(s->mutex);
}

static int by_place(const void *a, const void *b) {
    const stream_range *x = a, *y = b;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->part != y->part) return x->part < y->part ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Joins ranges that share a granule. */
static void join_ranges(stream *s) {
    qsort(s->ranges, (size_t)s->n_ranges, sizeof *s->ranges, by_place);
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_ranges; i++) {
        stream_range *last = n ? &s->ranges[n - 1] : NULL;
        const stream_range *r = &s->ranges[i];
        if (last && last->layer == r->layer && last->part == r->part &&
            r->offset - (last->offset + last->bytes) < s->granule)
            last->bytes = r->offset + r->bytes - last->offset;
        else s->ranges[n++] = *r;
    }
    s->n_ranges = n;
}

static void *copy_of(const void *from, size_t bytes) {
    void *to = malloc(bytes ? bytes : 1);
    return to ? memcpy(to, from, bytes) : NULL;
}

stream *stream_new(const stream_layout *layout, const stream_reader *reader) {
    stream *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    const size_t layers = (size_t)layout->n_layer, width = (size_t)layout->n_expert, experts = layers * width,
                 parts = (size_t)layout->n_parts;
    *s = (stream){
        .n_layer = layout->n_layer,
        .n_expert = layout->n_expert,
        .n_parts = layout->n_parts,
        .n_ranges = layout->n_ranges,
        .reader = *reader,
    };
    atomic_init(&s->closing, false);
    s->granule = os_granule();
    s->cycle = -1;
    s->hits_layer = -1;
    s->homes = copy_of(layout->homes, parts * sizeof *s->homes);
    s->names = calloc(parts, sizeof *s->names);
    bool whole = s->homes && s->names;
    for (size_t i = 0; whole && i < parts; i++)
        whole = (s->names[i] = copy_of(layout->names[i], strlen(layout->names[i]) + 1)) != NULL;
    s->ranges = copy_of(layout->ranges, (size_t)layout->n_ranges * sizeof *s->ranges);
    s->matrices = copy_of(layout->matrices, layers * STREAM_MATRICES * sizeof *s->matrices);
    s->at = calloc(experts * STREAM_MATRICES, sizeof *s->at);
    s->asked = calloc(experts, sizeof *s->asked);
    s->keep = calloc(experts, sizeof *s->keep);
    s->there = calloc(experts, sizeof *s->there);
    s->range_there = calloc((size_t)layout->n_ranges + 1, sizeof *s->range_there);
    s->jobs = calloc(1 + layers + experts, sizeof *s->jobs);
    s->runs = calloc((size_t)layout->n_ranges + experts * STREAM_MATRICES, sizeof *s->runs);
    s->list = calloc(experts, sizeof *s->list);
    s->first_job = calloc(layers + 2, sizeof *s->first_job);
    s->hits = calloc(width, sizeof *s->hits);
    s->wanted = calloc(width, sizeof *s->wanted);
    s->ends = os_reserve(2 * (size_t)s->granule);
    s->mutex = os_mutex_new();
    if (whole && s->ranges && s->matrices && s->at && s->asked && s->keep && s->there && s->range_there && s->jobs &&
        s->runs && s->list && s->first_job && s->hits && s->wanted && s->ends && s->mutex) {
        join_ranges(s);
        return s;
    }
    stream_free(s);
    return NULL;
}

void stream_free(stream *s) {
    if (!s) return;
    if (s->thread) {
        os_mutex_lock(s->mutex);
        atomic_store(&s->closing, true);
        os_mutex_wake_all(s->mutex);
        os_mutex_unlock(s->mutex);
        os_thread_join(s->thread);
    }
    os_release(s->ring, s->ring_bytes);
    os_release(s->ends, 2 * (size_t)s->granule);
    for (int32_t i = 0; s->names && i < s->n_parts; i++) free(s->names[i]);
    os_mutex_free(s->mutex);
    void *const all[] = {s->homes,     s->names,    s->ranges,      s->matrices, (void *)s->at, s->asked,
                         s->keep,      s->there,    s->range_there, s->jobs,     s->runs,       s->list,
                         s->first_job, s->sequence, s->hits,        s->wanted};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(s);
}
