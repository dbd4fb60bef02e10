#define _GNU_SOURCE
/* Models: a file is refused, or it runs, whatever its weights are; and a session takes no more memory than was told
 * before. */
#include "files.h"
#include "os.h"

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t room, unsigned seed) {
    return mutate_file(data, n, room, seed);
}

enum {
    MOST_TOKENS = 4096,
    MOST_BYTES = 64 << 20, /* of a session that is run; a larger one is made, which takes next to nothing */
    SLACK = 16 << 20,      /* what else a run takes, with the watch of ASan over it */
    SHORT = 64,            /* canvases that are short enough for a second step */
};

/* Nothing is chosen from numbers that are none. */
static bool check_step(const dg_event *e, void *user) {
    const int32_t n_vocab = *(const int32_t *)user;
    for (int32_t i = 0; e->kind == DG_EVENT_STEP && i < e->n; i++) {
        MUST(e->entropy[i] >= 0.0f && e->entropy[i] < 1e9f, "entropy %g", (double)e->entropy[i]);
        MUST(e->canvas[i] >= 0 && e->canvas[i] < n_vocab && e->next[i] >= 0 && e->next[i] < n_vocab, "tokens %d, %d",
             e->canvas[i], e->next[i]);
    }
    return true;
}

/* A prompt, one canvas in few steps, and one more encoded: on every backend, since each has its own kernels. */
static void use_model(dg_model *model) {
    const dg_config *c = dg_model_config(model);
    const int32_t context = c->context_length < 32 ? c->context_length : 32;
    const int64_t told = dg_session_bytes(model, context), before = os_resident();
    dg_error error = {0};
    dg_session *session;
    const int made = dg_session_new(model, context, &session, &error);
    if (made != DG_OK) {
        check_refusal(made, &error);
        MUST(made == DG_ERROR_MEMORY && told > MOST_BYTES, "%lld bytes: %s", (long long)told, error.message);
        return;
    }
    MUST(os_resident() - before <= SLACK, "%lld bytes for a session that does nothing",
         (long long)(os_resident() - before));
    if (c->n_vocab > MOST_TOKENS || told > MOST_BYTES) {
        dg_session_free(session);
        return;
    }
    dg_sampling sampling;
    dg_sampling_default(model, &sampling);
    sampling.steps = c->canvas_length > SHORT ? 1 : 2;
    sampling.max_tokens = c->canvas_length;
    const int32_t ids[3] = {0, c->n_vocab / 2, c->n_vocab - 1};
    float *logits = malloc(sizeof *logits * (size_t)c->n_vocab);
    MUST(logits, "no memory");
    dg_result *result;
    int status = dg_encode(session, ids, 3, DG_LOGITS_LAST, logits, &error);
    int32_t n_vocab = c->n_vocab;
    for (int32_t v = 0; status == DG_OK && v < c->n_vocab; v++)
        MUST(logits[v] >= -1e30f && logits[v] <= 1e30f, "logit %g", (double)logits[v]);
    if (status == DG_OK) status = dg_generate(session, &sampling, check_step, &n_vocab, &result, &error);
    if (status != DG_OK) check_refusal(status, &error);
    else {
        for (int32_t i = 0; i < result->n_ids; i++)
            MUST(result->ids[i] >= 0 && result->ids[i] < c->n_vocab, "token %d", result->ids[i]);
        dg_result_free(result);
    }
    int64_t *counts = malloc(sizeof *counts * (size_t)(c->n_layer * c->n_expert));
    MUST(counts && dg_model_threads(model) == 1, "%d threads of %s", dg_model_threads(model), dg_model_backend(model));
    dg_model_routing(model, counts);
    for (int32_t i = 0; i < c->n_layer * c->n_expert; i++) MUST(counts[i] >= 0, "%lld rows", (long long)counts[i]);
    free(counts), free(logits);
    MUST(os_resident() - before <= told + SLACK, "%lld bytes where %lld were told", (long long)(os_resident() - before),
         (long long)told);
    dg_session_free(session);
}

static int open_and_close(const void *path, dg_error *error) {
    const dg_model_options options = {.threads = 1};
    dg_model *model;
    const int status = dg_model_open(path, &options, &model, error);
    if (status == DG_OK) dg_model_free(model);
    return status;
}

/* Checks that the file alone tells the same configuration as the model that was opened from it. */
static void compare_config(const char *path, const dg_config *of_model) {
    dg_error error = {0};
    dg_file *file;
    dg_config of_file;
    MUST(dg_file_open(path, &file, &error) == DG_OK, "%s", error.message);
    MUST(dg_file_config(file, &of_file, &error) == DG_OK, "%s", error.message);
    MUST(of_file.n_layer == of_model->n_layer && of_file.n_vocab == of_model->n_vocab, "%d layers, %d tokens",
         of_file.n_layer, of_file.n_vocab);
    dg_file_free(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const char *file = file_of(data, n);
    const char *backends[] = {"cpu", "reference"};
    if (try_twice(open_and_close, file, data, n) != DG_OK) return 0;
    for (int i = 0; i < 2; i++) {
        const dg_model_options options = {.backend = backends[i], .threads = 1};
        dg_error error = {0};
        dg_model *model;
        MUST(dg_model_open(file, &options, &model, &error) == DG_OK, "%s", error.message);
        if (i == 0) compare_config(file, dg_model_config(model));
        use_model(model);
        dg_model_free(model);
    }
    return 0;
}
