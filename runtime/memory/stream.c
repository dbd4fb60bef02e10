#include "stream.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

enum {
    TRIES = 8,              /* reads in a row that bring nothing further */
    LARGE_PAGE = 1 << 21,
    PORTION = 16,           /* experts that stay, handed out at a time: between two, what has arrived is looked for */
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
    int32_t run, n_runs;  /* of s->runs */
} job;

typedef struct slot {
    int64_t sequence;
} slot;

struct stream {
    int32_t n_layer, n_expert, n_parts, n_ranges;
    uint8_t **homes;
    char **names;
    stream_range *ranges;     /* in order of layer, part, offset */
    stream_matrix *matrices;
    stream_reader reader;
    int64_t granule;
    const uint8_t **at;       /* [n_layer][STREAM_MATRICES][n_expert] */

    /* What was asked for, what holds since the last pass began, and what is there. */
    bool *asked, *keep, *there, *range_there;
    int64_t asked_bytes, slot_bytes;
    int32_t asked_slots, n_slots;
    bool placed;              /* what was asked for holds */

    /* Made from it: jobs in the order of a pass. Job j of cycle c is number c * n_jobs + j. */
    job *jobs;
    run *runs;
    int32_t *list;
    int32_t n_jobs, n_runs, n_list;
    /* [n_layer + 2] of layer - 1; its ranges come first, then experts that stay, then the others */
    int32_t *first_job;
    uint8_t *ring;
    size_t ring_bytes;
    slot *slots;

    /* Shared with the thread, under the monitor. */
    monitor *m;
    os_thread *thread;
    atomic_bool closing;
    bool busy, reading, failed;
    dg_error error;
    int64_t next;             /* job that the thread takes next */
    int64_t cycle;            /* of the pass; -1 before the first */
    int32_t limit;            /* layers of this pass whose experts are used */
    int64_t filled, taken, released; /* buffers: so far */
    bool *hits;               /* [n_expert] of hits_layer, in this pass */
    int32_t hits_layer;       /* -1: not known */
    bool *wanted;             /* [n_expert] the thread's own copy */
    uint8_t *ends;            /* two granules of the thread's own */
    dg_traffic traffic;

    /* The pass's own. */
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

/* The runs of experts list[first .. first + count) of a layer, neighbours joined, one after another in a buffer.
 * Returns the room that they take there. write: into s->runs. */
static int64_t lay_runs(stream *s, int32_t l, int32_t first, int32_t count, bool write) {
    int64_t place = 0;
    for (int32_t i = 0; i < STREAM_MATRICES; i++) {
        const stream_matrix *m = matrix_of(s, l, i);
        for (int32_t k = 0; m->bytes && k < count;) {
            const int32_t from = s->list[first + k];
            int32_t to = from;
            while (k < count && s->list[first + k] == to) k++, to++;
            const run r = {m->part, i, from, to, m->offset + from * m->bytes, (to - from) * m->bytes, place};
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

/* Jobs for experts of one kind: list entries that are (kept, there), as many at a time as `fits`. */
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

/* Gives back the memory of experts that stay no longer. */
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

/* Large pages where a whole one stays. */
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

/* Makes jobs of what is to stay and what is there. The thread is not reading. */
static bool make_jobs(stream *s) {
    memcpy(s->keep, s->asked, (size_t)s->n_layer * (size_t)s->n_expert * sizeof *s->keep);
    let_go(s);
    os_release(s->ring, s->ring_bytes);
    free(s->slots);
    s->slot_bytes = s->asked_bytes;
    s->n_slots = s->asked_slots;
    s->ring = NULL;
    s->slots = NULL;
    s->ring_bytes = (size_t)s->slot_bytes * (size_t)s->n_slots;
    if (s->n_slots) {
        s->ring = os_reserve(s->ring_bytes);
        s->slots = calloc((size_t)s->n_slots, sizeof *s->slots);
        if (!s->ring || !s->slots) return false;
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

/* Reads bytes [offset, offset + bytes) of a part, and what of their granules lies beside them, to where the first
 * granule belongs. */
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

/* Less than two granules of a part to their home, without touching what lies beside them: others may be reading
 * that. */
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

/* One run, to `base` + its place or home; of a buffer's run only the experts that are wanted, if that is known. */
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

/* The job to do now, or NULL: nothing is to do, or no buffer is free. Moves s->next to it. */
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
    monitor_enter(s->m);
    while (!atomic_load(&s->closing)) {
        job *j = job_to_do(s);
        if (!j) {
            monitor_wait(s->m);
            continue;
        }
        const int64_t sequence = s->next++;
        uint8_t *base = j->streamed ? s->ring + s->filled % s->n_slots * s->slot_bytes : NULL;
        const bool known = j->streamed && sequence / s->n_jobs == s->cycle && s->hits_layer == j->layer;
        if (known) memcpy(s->wanted, s->hits, (size_t)s->n_expert * sizeof *s->wanted);
        s->reading = true;
        monitor_leave(s->m);
        int64_t total = 0;
        dg_error error = {0};
        const uint64_t began = os_nanoseconds();
        const int status = read_job(s, j, base, known ? s->wanted : NULL, &total, &error);
        const double took = 1e-9 * (double)(os_nanoseconds() - began);
        monitor_enter(s->m);
        s->traffic.reading += took;
        s->reading = false;
        s->traffic.read += total;
        if (j->n_runs && s->reader.copies && s->reader.copies(s->reader.self, s->runs[j->run].part))
            s->traffic.copied += total;
        if (status != DG_OK) {
            s->failed = true;
            s->error = error;
        } else if (j->streamed) s->slots[s->filled++ % s->n_slots].sequence = sequence;
        else mark_there(s, j);
        monitor_wake(s->m);
    }
    monitor_leave(s->m);
}

/* ---- Passes ---- */

/* Waits until something changes, and counts how long. */
static void wait_for_thread(stream *s) {
    const uint64_t began = os_nanoseconds();
    monitor_wake(s->m);
    monitor_wait(s->m);
    s->traffic.waited += 1e-9 * (double)(os_nanoseconds() - began);
}

/* Buffers filled for what comes before this job of the pass are free again: of a pass that ended early, or of a
 * layer whose experts were left out. */
static void drop_stale(stream *s, int32_t before) {
    while (s->taken < s->filled && s->slots[s->taken % s->n_slots].sequence < s->cycle * s->n_jobs + before)
        s->released = ++s->taken;
}

/* In a forked process nobody reads, and nobody is within a pass. What was being read comes again. */
static void begin_anew(stream *s) {
    os_thread_join(s->thread);
    s->thread = NULL;
    s->reading = s->busy = false;
    s->failed = true;
}

void stream_begin(stream *s, int32_t layers) {
    monitor_enter(s->m);
    if (s->thread && !os_thread_runs(s->thread)) begin_anew(s);
    while (s->busy) monitor_wait(s->m);
    s->busy = true;
    if (!s->placed || s->failed) {
        while (s->reading) monitor_wait(s->m);
        s->failed = false;
        s->taken = s->released = s->filled;
        s->next = (s->cycle + 1) * s->n_jobs;
        if (!s->placed && !make_jobs(s))
            s->failed = true, fail(&s->error, DG_ERROR_SYSTEM, "no memory for a ring of %lld bytes",
                                   (long long)s->slot_bytes * s->n_slots);
    }
    if (!s->failed && !s->thread && !(s->thread = os_thread_start(work, s)))
        s->failed = true, fail(&s->error, DG_ERROR_SYSTEM, "cannot start a thread that reads ahead");
    s->cycle++;
    s->limit = layers;
    s->hits_layer = -1;
    if (s->next < s->cycle * s->n_jobs) s->next = s->cycle * s->n_jobs;
    drop_stale(s, 0);
    monitor_wake(s->m);
    monitor_leave(s->m);
}

bool stream_layer(stream *s, int32_t l) {
    monitor_enter(s->m);
    if (!s->failed) drop_stale(s, s->first_job[l + 1]);
    while (!s->failed && !s->jobs[s->first_job[l + 1]].done) wait_for_thread(s);
    const bool there = !s->failed;
    monitor_leave(s->m);
    return there;
}

static int32_t give(stream *s, const job *j, int32_t *out, int32_t count) {
    memcpy(out + count, s->list + j->first, (size_t)j->count * sizeof *out);
    return count + j->count;
}

/* Where the experts of a job lie in a buffer. */
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
    monitor_enter(s->m);
    s->released = s->taken; /* what was given before is done with */
    monitor_wake(s->m);
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
    monitor_leave(s->m);
    return count;
}

expert_feed stream_experts(stream *s, int32_t l, const int32_t *experts, int64_t n) {
    monitor_enter(s->m);
    memset(s->hits, 0, (size_t)s->n_expert * sizeof *s->hits);
    for (int64_t i = 0; i < n; i++) s->hits[experts[i]] = true;
    s->hits_layer = l;
    s->at_home = s->first_job[l + 1] + 1;
    s->end_ring = s->first_job[l + 2];
    s->at_ring = s->at_home;
    while (s->at_ring < s->end_ring && !s->jobs[s->at_ring].streamed) s->at_ring++;
    s->end_home = s->at_ring;
    monitor_leave(s->m);
    return (expert_feed){next_portion, s};
}

int stream_end(stream *s, dg_error *error) {
    monitor_enter(s->m);
    s->released = s->taken;
    s->hits_layer = -1;
    const int64_t first = (s->cycle + 1) * s->n_jobs;
    if (s->next < first) s->next = first; /* what this pass left out is not read for nothing */
    int status = DG_OK;
    if (s->failed) status = fail(error, (dg_status)s->error.status, "%s", s->error.message);
    else s->traffic.passes++;
    s->busy = false;
    monitor_wake(s->m);
    monitor_leave(s->m);
    return status;
}

void stream_traffic(stream *s, dg_traffic *out) {
    monitor_enter(s->m);
    *out = s->traffic;
    out->experts = out->streamed = 0;
    for (int64_t i = 0; i < (int64_t)s->n_layer * s->n_expert; i++) {
        int64_t bytes = 0;
        for (int32_t k = 0; k < STREAM_MATRICES; k++) bytes += matrix_of(s, (int32_t)(i / s->n_expert), k)->bytes;
        out->experts += bytes;
        out->streamed += s->keep[i] ? 0 : bytes;
    }
    monitor_leave(s->m);
}

/* ---- Beginning and end ---- */

void stream_place(stream *s, const bool *keep, int64_t slot_bytes, int32_t n_slots) {
    monitor_enter(s->m);
    const size_t size = (size_t)s->n_layer * (size_t)s->n_expert * sizeof *keep;
    if (memcmp(s->asked, keep, size) != 0 || s->asked_bytes != down(s, slot_bytes) || s->asked_slots != n_slots)
        s->placed = false;
    memcpy(s->asked, keep, size);
    s->asked_bytes = down(s, slot_bytes);
    s->asked_slots = n_slots;
    monitor_leave(s->m);
}

static int by_place(const void *a, const void *b) {
    const stream_range *x = a, *y = b;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->part != y->part) return x->part < y->part ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Ranges that share a granule, or meet in one, are one. */
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
    s->m = monitor_new();
    if (whole && s->ranges && s->matrices && s->at && s->asked && s->keep && s->there && s->range_there && s->jobs &&
        s->runs && s->list && s->first_job && s->hits && s->wanted && s->ends && s->m) {
        join_ranges(s);
        return s;
    }
    stream_free(s);
    return NULL;
}

void stream_free(stream *s) {
    if (!s) return;
    if (s->thread) {
        monitor_enter(s->m);
        atomic_store(&s->closing, true);
        monitor_wake(s->m);
        monitor_leave(s->m);
        os_thread_join(s->thread);
    }
    os_release(s->ring, s->ring_bytes);
    os_release(s->ends, 2 * (size_t)s->granule);
    for (int32_t i = 0; s->names && i < s->n_parts; i++) free(s->names[i]);
    monitor_free(s->m);
    void *const all[] = {s->homes,       s->names, s->ranges, s->matrices, (void *)s->at, s->asked, s->keep, s->there,
                         s->range_there, s->jobs,  s->runs,   s->list,     s->first_job,  s->slots, s->hits, s->wanted};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(s);
}
