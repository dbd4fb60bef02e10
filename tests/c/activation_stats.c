/* Observing a model: the sums of a pass, the same for any number of threads, and a table of operations as it was; also
 * together with a profile. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "dg.h"

static const char FILE_NAME[] = "runtime/dgemma/models/sudoku-q8_0.gguf";
static const char *const NAMES[] = {"token_embd.weight",          "blk.0.attn_q.weight",
                                    "blk.1.ffn_down.weight",      "blk.0.ffn_gate_up_exps.weight",
                                    "blk.1.ffn_down_exps.weight", "self_cond_gate.weight"};
enum { MATRICES = sizeof NAMES / sizeof *NAMES, MOST = 4096, CANVAS = 30 };

typedef struct found {
    double sums[MATRICES][MOST], squares[MATRICES][MOST];
    int64_t counts[MATRICES];
    float *logits;
} found;

static void run(int32_t threads, bool observe, found *f) {
    dg_error e;
    dg_model *m = NULL;
    dg_session *s = NULL;
    CHECK(dg_model_open(FILE_NAME, &(dg_model_options){.threads = threads}, &m, &e) == DG_OK, "%s", e.message);
    CHECK(dg_session_new(m, 64, &s, &e) == DG_OK, "%s", e.message);
    const int64_t n = (int64_t)CANVAS * dg_model_config(m)->n_vocab;
    f->logits = malloc((size_t)n * sizeof *f->logits);
    float *condition = malloc((size_t)n * sizeof *condition);
    int32_t ids[CANVAS];
    for (int32_t i = 0; i < CANVAS; i++) ids[i] = i * 7 % dg_model_config(m)->n_vocab;
    if (observe) CHECK(dg_moments_start(m, &e) == DG_OK, "%s", e.message);
    CHECK(dg_encode(s, ids, 20, DG_LOGITS_LAST, f->logits, &e) == DG_OK, "%s", e.message);
    CHECK(dg_denoise(s, ids, CANVAS, NULL, condition, &e) == DG_OK, "%s", e.message);
    CHECK(dg_denoise(s, ids, CANVAS, condition, f->logits, &e) == DG_OK, "%s", e.message);
    for (int32_t i = 0; observe && i < MATRICES; i++) {
        CHECK(dg_moments_read(m, NAMES[i], 0, f->sums[i], f->squares[i], &f->counts[i], &e) == DG_OK, "%s", e.message);
        CHECK(f->counts[i] > 0, "%s was not observed", NAMES[i]);
    }
    int64_t count;
    const int status = dg_moments_read(m, "blk.0.attn_norm.weight", 0, f->sums[0], f->squares[0], &count, &e);
    CHECK(status == DG_ERROR_USAGE, "a norm is no matrix: %d", status);
    if (observe) {
        CHECK(dg_moments_read(m, NAMES[0], 1, f->sums[0], f->squares[0], &count, &e) == DG_ERROR_USAGE,
              "an expert of the embedding");
        CHECK(dg_moments_start(m, &e) == DG_OK, "again, from zero: %s", e.message);
        CHECK(dg_moments_read(m, NAMES[0], 0, f->sums[0], f->squares[0], &count, &e) == DG_OK && count == 0,
              "not from zero: %lld", (long long)count);
        if (threads == 1) dg_moments_stop(m); /* else the model's end is its end */
    }
    free(condition);
    dg_session_free(s);
    dg_model_free(m);
}

/* ---- Together with a profile ---- */

enum { MOST_ENTRIES = 4096 };

static int32_t profile_calls(const dg_model *m, int64_t *calls) {
    dg_profile_entry entry;
    int32_t n = 0;
    for (; n < MOST_ENTRIES && dg_profile_read(m, n, &entry); n++) calls[n] = entry.calls;
    return n;
}

static void read_sums(const dg_model *m, found *f) {
    dg_error e;
    for (int32_t i = 0; i < MATRICES; i++)
        CHECK(dg_moments_read(m, NAMES[i], 0, f->sums[i], f->squares[i], &f->counts[i], &e) == DG_OK, "%s", e.message);
}

static void two_passes(dg_session *s, float *logits) {
    dg_error e;
    int32_t ids[CANVAS];
    for (int32_t i = 0; i < CANVAS; i++) ids[i] = i * 5 % 50;
    CHECK(dg_session_rewind(s, 0, &e) == DG_OK, "%s", e.message);
    CHECK(dg_encode(s, ids, 20, DG_LOGITS_NONE, NULL, &e) == DG_OK, "%s", e.message);
    CHECK(dg_denoise(s, ids, CANVAS, NULL, logits, &e) == DG_OK, "%s", e.message);
}

/* Both in each order of start and of stop: each gives what it gives alone, and one goes on when the other stops. */
static void test_profile_and_statistics(void) {
    static found alone, both;
    static int64_t calls_alone[MOST_ENTRIES], calls[MOST_ENTRIES];
    dg_error e;
    dg_model *m = NULL;
    dg_session *s = NULL;
    CHECK(dg_model_open(FILE_NAME, &(dg_model_options){.threads = 2}, &m, &e) == DG_OK, "%s", e.message);
    CHECK(dg_session_new(m, 64, &s, &e) == DG_OK, "%s", e.message);
    const size_t bytes = (size_t)CANVAS * (size_t)dg_model_config(m)->n_vocab * sizeof(float);
    float *plain = malloc(bytes), *logits = malloc(bytes);
    two_passes(s, plain);
    CHECK(dg_moments_start(m, &e) == DG_OK, "%s", e.message);
    two_passes(s, logits);
    read_sums(m, &alone);
    dg_moments_stop(m);
    CHECK(dg_profile_start(m, &e) == DG_OK, "%s", e.message);
    two_passes(s, logits);
    const int32_t n = profile_calls(m, calls_alone);
    CHECK(n > 0 && n < MOST_ENTRIES, "%d entries", n);
    dg_profile_stop(m);
    for (int order = 0; order < 4; order++) {
        const bool profile_first = order & 1, profile_stops_first = order & 2;
        if (profile_first) CHECK(dg_profile_start(m, &e) == DG_OK, "%s", e.message);
        CHECK(dg_moments_start(m, &e) == DG_OK, "%s", e.message);
        if (!profile_first) CHECK(dg_profile_start(m, &e) == DG_OK, "%s", e.message);
        two_passes(s, logits);
        CHECK(memcmp(plain, logits, bytes) == 0, "order %d: other logits", order);
        CHECK(profile_calls(m, calls) == n && memcmp(calls, calls_alone, sizeof calls) == 0, "order %d: other calls",
              order);
        read_sums(m, &both);
        CHECK(memcmp(&both, &alone, sizeof both) == 0, "order %d: other sums", order);
        if (profile_stops_first) dg_profile_stop(m);
        else dg_moments_stop(m);
        two_passes(s, logits);
        if (profile_stops_first) {
            read_sums(m, &both);
            CHECK(both.counts[1] == 2 * alone.counts[1], "order %d: the statistics stopped with the profile", order);
            CHECK(!dg_profile_read(m, 0, &(dg_profile_entry){0}), "order %d: the profile goes on", order);
            dg_moments_stop(m);
        } else {
            profile_calls(m, calls);
            int64_t sum = 0, twice = 0;
            for (int32_t i = 0; i < n; i++) {
                sum += calls[i];
                twice += 2 * calls_alone[i];
            }
            CHECK(sum == twice, "order %d: %lld calls instead of %lld", order, (long long)sum, (long long)twice);
            CHECK(dg_moments_read(m, NAMES[0], 0, both.sums[0], both.squares[0], &both.counts[0], &e) == DG_ERROR_USAGE,
                  "order %d: the statistics go on", order);
            dg_profile_stop(m);
        }
        two_passes(s, logits);
        CHECK(memcmp(plain, logits, bytes) == 0, "order %d: other logits when both have stopped", order);
    }
    free(plain);
    free(logits);
    dg_session_free(s);
    dg_model_free(m);
}

int main(void) {
    static found plain, one, three;
    run(1, false, &plain);
    run(1, true, &one);
    run(3, true, &three);
    CHECK(memcmp(one.squares, three.squares, sizeof one.squares) == 0, "other sums with 3 threads than with 1");
    CHECK(memcmp(one.sums, three.sums, sizeof one.sums) == 0, "other first moments with 3 threads than with 1");
    CHECK(memcmp(one.counts, three.counts, sizeof one.counts) == 0, "other counts with 3 threads than with 1");
    CHECK(memcmp(plain.logits, one.logits, CANVAS * sizeof(float)) == 0, "observing changed the logits");
    CHECK(one.counts[0] == 1 + 2 * CANVAS, "the head saw %lld rows", (long long)one.counts[0]);
    CHECK(one.counts[1] == 20 + 2 * CANVAS, "attn_q of the first layer saw %lld rows", (long long)one.counts[1]);
    CHECK(one.counts[5] == CANVAS, "the self-conditioning saw %lld rows", (long long)one.counts[5]);
    free(plain.logits), free(one.logits), free(three.logits);
    test_profile_and_statistics();
    return check_done("activation_stats");
}
