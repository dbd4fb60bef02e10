/* Tests refusals of the system: every allocation, map, thread and read of opening a model and using it fails in turn,
 * once or from then on. Each time there is an error with a message, nothing is kept, and the next attempt succeeds. */
#define _GNU_SOURCE /* O_DIRECT */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "dg.h"
#include "refused.h"

/* ---- What is done ---- */

static const char *const file = "tests/fuzz/corpus/model/seed-q4_0";

static int use_session(dg_model *m, dg_error *error) {
    const int32_t ids[] = {2, 7, 8, 9, 7};
    float logits[16];
    dg_session *s = NULL;
    dg_result *r = NULL;
    dg_sampling o;
    dg_sampling_default(m, &o);
    o.steps = 2, o.max_tokens = 20, o.confidence = 0.0f;
    int status = dg_session_new(m, 40, &s, error);
    if (status == DG_OK) status = dg_encode(s, ids, 5, DG_LOGITS_LAST, logits, error);
    if (status == DG_OK) status = dg_generate(s, &o, NULL, NULL, &r, error);
    dg_result_free(r);
    dg_session_free(s);
    return status;
}

static int use_together(dg_model *m, dg_error *error) {
    enum { COUNT = 40 }; /* more rows than a session's own room has */
    const int32_t prompt[] = {2, 7}, canvas[8] = {7, 8, 9, 7, 8, 9, 7, 8};
    static float logits[COUNT][8 * 16];
    dg_session *s[COUNT] = {NULL};
    dg_canvas canvases[COUNT];
    int status = DG_OK;
    for (int i = 0; i < COUNT && status == DG_OK; i++) {
        status = dg_session_new(m, 8, &s[i], error);
        if (status == DG_OK) status = dg_encode(s[i], prompt, 2, DG_LOGITS_NONE, NULL, error);
        canvases[i] = (dg_canvas){s[i], canvas, 8, NULL, logits[i]};
    }
    if (status == DG_OK) status = dg_denoise_batch(canvases, COUNT, error);
    for (int i = 0; i < COUNT; i++) dg_session_free(s[i]);
    return status;
}

static int use_pins(dg_model *m, dg_error *error) {
    const int32_t prompt[] = {2, 7}, ids[10] = {7, 0, 0, 9, 0, 0, 0, 7, 0, 8};
    const bool pinned[10] = {true, false, false, true, false, false, false, true, false, true};
    const dg_start start = {ids, pinned, 10};
    dg_session *s = NULL;
    dg_generator *g = NULL;
    dg_sampling o;
    dg_sampling_default(m, &o);
    o.steps = 1;
    int status = dg_session_new(m, 40, &s, error);
    if (status == DG_OK) status = dg_encode(s, prompt, 2, DG_LOGITS_NONE, NULL, error);
    if (status == DG_OK) status = dg_generator_fill(s, &o, &start, &g, error);
    for (dg_event e = {0}; status == DG_OK && e.kind != DG_EVENT_DONE;) status = dg_generator_next(g, &e, error);
    dg_generator_free(g);
    dg_session_free(s);
    return status;
}

static int use_tokenizer(dg_model *m, dg_error *error) {
    (void)m;
    dg_tokenizer *t = NULL;
    int32_t ids[32];
    char text[64];
    size_t n = 0, n_bytes;
    int status = dg_tokenizer_open(file, &t, error);
    if (status == DG_OK) status = dg_tokenize(t, "abab \n\n\xFF<bos>c", 14, true, ids, 32, &n, error);
    if (status == DG_OK) status = dg_detokenize(t, ids, n, true, text, sizeof text, &n_bytes, error);
    dg_tokenizer_free(t);
    return status;
}

static const struct {
    const char *name;
    dg_model_options options;
    int (*use)(dg_model *m, dg_error *error);
} cases[] = {
    {"a generation", {.threads = 2}, use_session},
    {"a generation with the reference", {.threads = 1, .backend = "reference"}, use_session},
    {"a generation within a budget", {.threads = 2, .ram = 1ll << 33}, use_session},
    {"sessions together", {.threads = 1}, use_together},
    {"a canvas with pins", {.threads = 1}, use_pins},
    {"a tokenizer", {.threads = 1}, use_tokenizer},
};

static int run_case(int i, dg_error *error) {
    dg_model *m = NULL;
    int status = dg_model_open(file, &cases[i].options, &m, error);
    if (status == DG_OK) status = cases[i].use(m, error);
    dg_model_free(m);
    return status;
}

static void test_case(int i, bool good) {
    dg_error error = {0};
    atomic_store(&fails_at, 0);
    CHECK(run_case(i, &error) == DG_OK, "%s: %s", cases[i].name, error.message);
    const int before = held();
    atomic_store(&asked, 0);
    run_case(i, &error);
    const int requests = atomic_load(&asked);
    CHECK(requests > 10, "%s makes %d requests", cases[i].name, requests);
    atomic_store(&for_good, good);
    for (int n = 1; n <= requests; n++) {
        error = (dg_error){0};
        atomic_store(&asked, 0);
        atomic_store(&spared, false);
        atomic_store(&of_a_file, false);
        atomic_store(&fails_at, n);
        const int status = run_case(i, &error);
        atomic_store(&fails_at, 0);
        if (atomic_load(&asked) < n) break; /* the thread that reads ahead did not come so far this time */
        if (atomic_load(&spared)) continue;
        CHECK(status == DG_ERROR_SYSTEM || status == DG_ERROR_MEMORY,
              "%s: request %d of %d fails, and the status is %d", cases[i].name, n, requests, status);
        CHECK(status == error.status && error.message[0], "%s: request %d of %d: no message", cases[i].name, n,
              requests);
        CHECK(!atomic_load(&of_a_file) || strstr(error.message, file), "%s: request %d of %d of the file fails: %s",
              cases[i].name, n, requests, error.message);
        CHECK(held() == before, "%s: request %d of %d: %d things are kept", cases[i].name, n, requests,
              held() - before);
    }
    CHECK(run_case(i, &error) == DG_OK, "%s, at last: %s", cases[i].name, error.message);
    printf("faults: %s, %d requests%s\n", cases[i].name, requests, good ? ", all from one on" : "");
}

int main(void) {
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) test_case(i, false);
    test_case(0, true);
    test_case(2, true);
    return check_done("faults");
}
