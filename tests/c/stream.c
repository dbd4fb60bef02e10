/* The stream: every expert arrives whole, whatever stays and whatever the ring holds; what cannot be read fails the
 * pass, and nothing else. */
#include "memory/stream.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "material.h"

enum { LAYERS = 4, EXPERTS = 9, FILES = 2, MOST_BLOCK = 3 * 20000 };

/* ---- A file in memory, with faults ---- */

typedef struct faulty {
    uint8_t *bytes[FILES];
    int64_t size[FILES];
    atomic_llong reads, asked;
    atomic_llong fail_at;      /* the read that fails; -1: none */
    int64_t failure;           /* what it returns then: -errno, or 0: the file ends */
    int64_t most;              /* bytes that a read brings at most */
    atomic_bool changed;
    atomic_bool once;          /* the failure passes */
} faulty;

static int64_t read_faulty(void *self, int32_t i, void *to, int64_t bytes, int64_t offset) {
    faulty *f = self;
    const long long number = atomic_fetch_add(&f->reads, 1);
    const int64_t granule = os_granule();
    if (bytes % granule || offset % granule || (uintptr_t)to % (uintptr_t)granule)
        return -EINVAL; /* as direct reads do */
    const long long at = atomic_load(&f->fail_at);
    if (at >= 0 && (atomic_load(&f->once) ? number == at : number >= at)) return f->failure;
    if (offset >= f->size[i]) return 0;
    if (bytes > f->size[i] - offset) bytes = f->size[i] - offset;
    if (bytes > f->most) bytes = f->most;
    memcpy(to, f->bytes[i] + offset, (size_t)bytes);
    atomic_fetch_add(&f->asked, bytes);
    return bytes;
}

static int check_faulty(void *self, int32_t i, dg_error *error) {
    (void)i;
    if (!atomic_load(&((faulty *)self)->changed)) return DG_OK;
    error->status = DG_ERROR_SYSTEM;
    strcpy(error->message, "part: written to while it was in use");
    return DG_ERROR_SYSTEM;
}

/* ---- A model's layout: matrices of odd sizes at odd places, in two parts, and ranges around them ---- */

typedef struct fixture {
    faulty file;
    uint8_t *homes[FILES];
    stream_range ranges[LAYERS * 2 + 2];
    stream_matrix matrices[LAYERS * STREAM_MATRICES];
    int32_t n_ranges;
    stream *s;
} fixture;

static void add_range(fixture *f, int32_t l, int32_t i, int64_t *at, int64_t bytes) {
    f->ranges[f->n_ranges++] = (stream_range){l, i, *at, bytes};
    *at += bytes;
}

static void set_up(fixture *f) {
    static const char *const names[FILES] = {"first", "second"};
    memset(f, 0, sizeof *f);
    int64_t at[FILES] = {100, 32};
    add_range(f, -1, 0, &at[0], 5000);
    for (int32_t l = 0; l < LAYERS; l++) {
        const int32_t i = l >= LAYERS / 2;
        add_range(f, l, i, &at[i], 64 + 999 * l);
        const int64_t sizes[STREAM_MATRICES] = {12000 + 32 * l, l % 2 ? 0 : 9056, 4096 + 64 * l};
        for (int32_t k = 0; k < STREAM_MATRICES; k++) {
            if (!sizes[k]) continue;
            f->matrices[l * STREAM_MATRICES + k] = (stream_matrix){i, at[i], sizes[k]};
            at[i] += sizes[k] * EXPERTS + 96;
        }
        add_range(f, l, i, &at[i], 300);
    }
    add_range(f, -1, 1, &at[1], 17);
    for (int32_t i = 0; i < FILES; i++) {
        f->file.size[i] = at[i];
        f->file.bytes[i] = malloc((size_t)at[i]);
        for (int64_t k = 0; k < at[i]; k++) f->file.bytes[i][k] = (uint8_t)(uniform() * 256.0);
        f->homes[i] = os_reserve((size_t)at[i] + (size_t)os_granule());
    }
    f->file.most = 1 << 30;
    atomic_init(&f->file.fail_at, -1);
    const stream_layout layout = {LAYERS, EXPERTS, FILES, f->n_ranges, f->homes, names, f->ranges, f->matrices};
    const stream_reader reader = {read_faulty, check_faulty, NULL, &f->file};
    f->s = stream_new(&layout, &reader);
    CHECK(f->s != NULL, "no stream");
}

static void tear_down(fixture *f) {
    stream_free(f->s);
    for (int32_t i = 0; i < FILES; i++) {
        free(f->file.bytes[i]);
        os_release(f->homes[i], (size_t)f->file.size[i] + (size_t)os_granule());
    }
}

static void check_range(const fixture *f, int32_t l) {
    for (int32_t i = 0; i < f->n_ranges; i++) {
        const stream_range *r = &f->ranges[i];
        if (r->layer == l)
            CHECK(memcmp(f->homes[r->part] + r->offset, f->file.bytes[r->part] + r->offset, (size_t)r->bytes) == 0,
                  "range %d of layer %d", i, l);
    }
}

/* Takes a layer's experts: each comes once, and those that are used as the file has them. Returns how many came. */
static int32_t take(fixture *f, int32_t l, const int32_t *used, int32_t n) {
    expert_feed feed = stream_experts(f->s, l, used, n);
    int32_t out[EXPERTS], seen[EXPERTS] = {0}, total = 0;
    for (int32_t count; (count = feed.next(feed.self, out)) > 0;)
        for (int32_t k = 0; k < count; k++, total++) {
            const int32_t e = out[k];
            bool is_used = false;
            seen[e]++;
            for (int32_t u = 0; u < n; u++) is_used |= used[u] == e;
            for (int32_t i = 0; is_used && i < STREAM_MATRICES; i++) {
                const stream_matrix *m = &f->matrices[l * STREAM_MATRICES + i];
                if (m->bytes)
                    CHECK(memcmp(stream_at(f->s, l, i)[e], f->file.bytes[m->part] + m->offset + e * m->bytes,
                                 (size_t)m->bytes) == 0,
                          "layer %d, matrix %d, expert %d", l, i, e);
            }
        }
    for (int32_t e = 0; e < EXPERTS; e++) CHECK(seen[e] <= 1, "expert %d of layer %d came %d times", e, l, seen[e]);
    return total;
}

static const int32_t everyone[EXPERTS] = {0, 1, 2, 3, 4, 5, 6, 7, 8};

/* A pass through `layers` layers; those from `stop` on are not taken, as if the pass were left. */
static int pass_through(fixture *f, int32_t layers, int32_t stop, dg_error *error) {
    stream_begin(f->s, layers);
    bool there = stream_layer(f->s, -1);
    if (there) check_range(f, -1);
    for (int32_t l = 0; l < LAYERS && there && l < stop; l++) {
        there = stream_layer(f->s, l);
        if (!there) break;
        check_range(f, l);
        if (l >= layers) break;
        const int32_t came = take(f, l, everyone, EXPERTS);
        CHECK(came == EXPERTS || came < EXPERTS, "%d", came);
        if (came < EXPERTS) there = false;
    }
    return stream_end(f->s, error);
}

static void keep_some(bool keep[LAYERS * EXPERTS], double share) {
    for (int32_t i = 0; i < LAYERS * EXPERTS; i++) keep[i] = uniform() < share;
}

static int64_t streamed_bytes(const fixture *f, const bool *keep) {
    int64_t sum = 0;
    for (int32_t l = 0; l < LAYERS; l++)
        for (int32_t e = 0; e < EXPERTS; e++)
            for (int32_t i = 0; i < STREAM_MATRICES; i++)
                sum += keep[l * EXPERTS + e] ? 0 : f->matrices[l * STREAM_MATRICES + i].bytes;
    return sum;
}

/* ---- What arrives ---- */

static void test_every_placement(void) {
    fixture f;
    set_up(&f);
    const int64_t block = stream_block_bytes(f.s);
    dg_error error = {0};
    bool keep[LAYERS * EXPERTS];
    CHECK(block >= 12000 + 9056 + 4096 && block <= MOST_BLOCK, "a block takes %lld bytes", (long long)block);
    for (int32_t round = 0; round < 40; round++) { /* from one placement to the next, in one stream */
        keep_some(keep, (double[]){0.0, 0.3, 0.7, 1.0}[round % 4]);
        const int32_t slots = round % 4 == 3 ? 0 : 1 + round % 7;
        stream_place(f.s, keep, block * (1 + round % 3), slots);
        for (int32_t k = 0; k < 3; k++) {
            const int32_t layers = (round + k) % 5 == 4 ? LAYERS - 1 : LAYERS, stop = (round + k) % 7 == 6 ? 2 : LAYERS;
            CHECK(pass_through(&f, layers, stop, &error) == DG_OK, "round %d: %s", round, error.message);
        }
    }
    dg_traffic t;
    stream_traffic(f.s, &t);
    CHECK(t.passes == 120 && t.streamed == streamed_bytes(&f, keep) && t.copied == 0, "%lld passes",
          (long long)t.passes);
    tear_down(&f);
}

static void test_what_stays_is_read_once(void) {
    fixture f;
    set_up(&f);
    dg_error error = {0};
    bool keep[LAYERS * EXPERTS];
    keep_some(keep, 1.0);
    stream_place(f.s, keep, stream_block_bytes(f.s), 0);
    CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
    const long long after_first = atomic_load(&f.file.asked);
    CHECK(after_first >= f.file.size[0] + f.file.size[1] - 96 * LAYERS * STREAM_MATRICES - 200, "%lld bytes",
          after_first);
    for (int32_t k = 0; k < 3; k++) CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
    CHECK(atomic_load(&f.file.asked) == after_first, "read again");
    dg_traffic t;
    stream_traffic(f.s, &t);
    CHECK(t.read == after_first && t.streamed == 0, "%lld bytes counted, %lld read", (long long)t.read, after_first);
    /* shrunk: what went comes through the ring, the rest is not read again */
    keep[EXPERTS] = false;
    stream_place(f.s, keep, stream_block_bytes(f.s), 2);
    CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
    stream_traffic(f.s, &t);
    CHECK(t.read - after_first <= 2 * stream_block_bytes(f.s), "%lld bytes for one expert",
          (long long)(t.read - after_first));
    tear_down(&f);
}

/* With all streamed a pass reads each expert once, however many passes there are and however deep the ring is. */
static void test_bytes_per_pass(void) {
    for (int32_t slots = 1; slots < 40; slots += 6) {
        fixture f;
        set_up(&f);
        dg_error error = {0};
        const bool keep[LAYERS * EXPERTS] = {false};
        stream_place(f.s, keep, stream_block_bytes(f.s) * 3, slots);
        enum { PASSES = 20 };
        for (int32_t k = 0; k < PASSES; k++)
            CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
        dg_traffic t;
        stream_traffic(f.s, &t);
        const int64_t slack =
            LAYERS * EXPERTS * STREAM_MATRICES * 2 * os_granule(); /* granules that neighbours share */
        CHECK(t.streamed == streamed_bytes(&f, keep), "%lld", (long long)t.streamed);
        CHECK(t.read >= PASSES * t.streamed && t.read <= (PASSES + 2) * (t.streamed + slack),
              "%d slots: %lld bytes in %d passes of %lld", slots, (long long)t.read, PASSES, (long long)t.streamed);
        tear_down(&f);
    }
}

/* Experts that nobody uses need not come; those that are used do. */
static void test_unused_experts(void) {
    fixture f;
    set_up(&f);
    dg_error error = {0};
    const bool keep[LAYERS * EXPERTS] = {false};
    stream_place(f.s, keep, stream_block_bytes(f.s) * 2, 2);
    for (int32_t k = 0; k < 30; k++) {
        stream_begin(f.s, LAYERS);
        CHECK(stream_layer(f.s, -1), "the weights before the first layer");
        for (int32_t l = 0; l < LAYERS; l++) {
            const int32_t used[] = {(k + l) % EXPERTS, (k * 5 + l * 3) % EXPERTS};
            CHECK(stream_layer(f.s, l), "layer %d", l);
            CHECK(take(&f, l, used, 2) == EXPERTS, "layer %d", l);
        }
        CHECK(stream_end(f.s, &error) == DG_OK, "%s", error.message);
    }
    dg_traffic t;
    stream_traffic(f.s, &t);
    CHECK(t.read < 30 * t.streamed, "%lld of %lld bytes were read", (long long)t.read, (long long)(30 * t.streamed));
    tear_down(&f);
}

/* ---- What does not ---- */

static void test_failures(void) {
    const struct {
        int64_t failure;
        const char *words;
    } kinds[] = {{-EIO, "cannot read"}, {0, "truncated while it was in use"}};
    bool keep[LAYERS * EXPERTS];
    for (int32_t round = 0; round < 60; round++) {
        fixture f;
        set_up(&f);
        dg_error error = {0};
        keep_some(keep, 0.5);
        stream_place(f.s, keep, stream_block_bytes(f.s), 1 + round % 4);
        f.file.failure = kinds[round % 2].failure;
        atomic_store(&f.file.fail_at, round * 3 / 2);
        atomic_store(&f.file.once, round % 3 == 0);
        int status = DG_OK;
        for (int32_t k = 0; k < 3 && status == DG_OK; k++) status = pass_through(&f, LAYERS, LAYERS, &error);
        CHECK(status == DG_ERROR_SYSTEM && strstr(error.message, kinds[round % 2].words), "round %d: status %d, '%s'",
              round, status, error.message);
        /* a fault that has passed is over, one that has not is told again; either way the stream ends well */
        const int again = pass_through(&f, LAYERS, LAYERS, &error);
        CHECK(again == (round % 3 == 0 ? DG_OK : DG_ERROR_SYSTEM), "round %d, again: %d, %s", round, again,
              error.message);
        tear_down(&f);
    }
}

static void test_short_reads(void) {
    fixture f;
    dg_error error = {0};
    const bool keep[LAYERS * EXPERTS] = {true, false, true};
    set_up(&f);
    f.file.most = os_granule() + 100; /* more than a granule: goes on where it stopped */
    stream_place(f.s, keep, stream_block_bytes(f.s), 3);
    for (int32_t k = 0; k < 3; k++) CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
    tear_down(&f);
    set_up(&f);
    f.file.most = 100; /* less: direct reads cannot go on there */
    stream_place(f.s, keep, stream_block_bytes(f.s), 3);
    CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_ERROR_SYSTEM && strstr(error.message, "again and again"), "%s",
          error.message);
    tear_down(&f);
}

static void test_changed_file(void) {
    fixture f;
    dg_error error = {0};
    const bool keep[LAYERS * EXPERTS] = {false};
    set_up(&f);
    stream_place(f.s, keep, stream_block_bytes(f.s), 3);
    CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_OK, "%s", error.message);
    atomic_store(&f.file.changed, true);
    CHECK(pass_through(&f, LAYERS, LAYERS, &error) == DG_ERROR_SYSTEM && strstr(error.message, "written to"), "%s",
          error.message);
    tear_down(&f);
}

/* Files where there are no direct reads, as the kernel's own, are read as files are. */
static void test_without_direct_reads(void) {
    os_file *file;
    dg_error error = {0};
    uint8_t *to = os_reserve((size_t)os_granule());
    if (os_file_open("/proc/version", NULL, &file, &error) == DG_OK) {
        CHECK(os_file_read(file, to, os_granule(), 0) > 0 && !os_file_direct(file), "%s", error.message);
        CHECK(os_file_read(file, to, os_granule(), os_granule()) == 0, "past the end");
        os_file_close(file);
    }
    os_release(to, (size_t)os_granule());
    CHECK(os_file_open("/nowhere/at/all", NULL, &file, &error) == DG_ERROR_SYSTEM &&
              strstr(error.message, "/nowhere/at/all"),
          "%s", error.message);
}

/* Ended before anything, while the thread reads ahead, and while it waits for a free buffer. */
static void test_ends(void) {
    for (int32_t stop = -1; stop <= LAYERS; stop++) {
        fixture f;
        dg_error error = {0};
        const bool keep[LAYERS * EXPERTS] = {true};
        set_up(&f);
        stream_place(f.s, keep, stream_block_bytes(f.s), 2);
        if (stop >= 0) CHECK(pass_through(&f, LAYERS, stop, &error) == DG_OK, "%s", error.message);
        tear_down(&f);
    }
}

/* Passes of several threads take turns. */
static fixture shared;
static atomic_int passed;
static void passes(void *arg) {
    dg_error error = {0};
    (void)arg;
    for (int32_t k = 0; k < 10; k++) atomic_fetch_add(&passed, pass_through(&shared, LAYERS, LAYERS, &error) == DG_OK);
}

static void test_turns(void) {
    const bool keep[LAYERS * EXPERTS] = {false};
    set_up(&shared);
    stream_place(shared.s, keep, stream_block_bytes(shared.s), 2);
    os_thread *others[3];
    for (int32_t i = 0; i < 3; i++) others[i] = os_thread_start(passes, NULL);
    for (int32_t i = 0; i < 3; i++) os_thread_join(others[i]);
    CHECK(atomic_load(&passed) == 30, "%d passes of 30", atomic_load(&passed));
    tear_down(&shared);
}

int main(void) {
    test_every_placement();
    test_what_stays_is_read_once();
    test_bytes_per_pass();
    test_unused_experts();
    test_failures();
    test_short_reads();
    test_changed_file();
    test_without_direct_reads();
    test_ends();
    test_turns();
    return check_done("stream");
}
