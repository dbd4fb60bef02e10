/* Block diffusion: canvas after canvas, each refined step by step until it is stable and certain. */
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "sampler.h"
#include "session.h"

enum { MOST_BLOCKS = 1 << 20 };

typedef enum phase { PHASE_FIRST, PHASE_STEP, PHASE_COMMIT, PHASE_NEXT, PHASE_DONE } phase;

struct dg_generator {
    dg_session *session;
    dg_sampling options;
    phase phase;
    int32_t n;              /* canvas length */
    int32_t index;          /* of the next step in this canvas */
    int32_t unchanged;      /* steps in a row whose argmax canvas was the last one's */
    bool converged;
    int32_t *canvas;        /* [n] what the decoder sees next */
    int32_t *argmax;        /* [n] of the last step */
    int32_t *order;         /* [2 n] room for the sampler */
    int32_t *random_ids;    /* [n] */
    double *u;              /* [n] */
    dg_choice *choices;     /* [n] */
    float *entropy;         /* [n] */
    bool *accepted;         /* [n] */
    float *z;               /* [n][n_vocab] the last step's logits / temperature */
    size_t z_bytes;
    int32_t *ids;           /* [max blocks * n] the answer */
    dg_block *blocks;
    dg_result result;
};

void dg_sampling_default(const dg_model *model, dg_sampling *s) {
    const dg_config *c = &model->config;
    *s = (dg_sampling){
        .max_tokens = c->canvas_length, .steps = c->steps, .entropy_bound = c->entropy_bound, .t_min = c->t_min, .t_max = c->t_max,
        .stability = c->stability, .confidence = c->confidence, .seed = 0,
    };
}

int dg_generator_new(dg_session *session, const dg_sampling *sampling, dg_generator **out, dg_error *error) {
    *out = NULL;
    const dg_config *c = &session->model->config;
    if (dg_sampling_check(sampling, error) != DG_OK) return DG_ERROR_USAGE;
    const int64_t n = c->canvas_length, blocks = ((int64_t)sampling->max_tokens + n - 1) / n;
    if (session->length < 1) return fail(error, DG_ERROR_USAGE, "nothing is encoded: a canvas needs a prompt of at least one token");
    if (blocks > MOST_BLOCKS || session->length + (blocks - 1) * n > session->context)
        return fail(error, DG_ERROR_USAGE, "max_tokens %d does not fit: the context holds %d tokens and has %d", sampling->max_tokens,
                    session->context, session->length);
    dg_generator *g = calloc(1, sizeof *g);
    if (!g) return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas");
    const size_t size = (size_t)n;
    *g = (dg_generator){.session = session, .options = *sampling, .n = (int32_t)n, .z_bytes = size * (size_t)c->n_vocab * sizeof(float)};
    g->canvas = malloc(size * sizeof *g->canvas);
    g->argmax = malloc(size * sizeof *g->argmax);
    g->order = malloc(2 * size * sizeof *g->order);
    g->random_ids = malloc(size * sizeof *g->random_ids);
    g->u = malloc(size * sizeof *g->u);
    g->choices = malloc(size * sizeof *g->choices);
    g->entropy = malloc(size * sizeof *g->entropy);
    g->accepted = malloc(size * sizeof *g->accepted);
    g->z = os_reserve(g->z_bytes);
    g->ids = malloc((size_t)blocks * size * sizeof *g->ids);
    g->blocks = malloc((size_t)blocks * sizeof *g->blocks);
    g->result = (dg_result){.ids = g->ids, .blocks = g->blocks, .end_id = -1, .converged = true};
    if (!g->canvas || !g->argmax || !g->order || !g->random_ids || !g->u || !g->choices || !g->entropy || !g->accepted || !g->z || !g->ids || !g->blocks) {
        dg_generator_free(g);
        return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas of %d tokens", c->canvas_length);
    }
    *out = g;
    return DG_OK;
}

void dg_generator_free(dg_generator *g) {
    if (!g) return;
    free(g->canvas);
    free(g->argmax);
    free(g->order);
    free(g->random_ids);
    free(g->u);
    free(g->choices);
    free(g->entropy);
    free(g->accepted);
    os_release(g->z, g->z_bytes);
    free(g->ids);
    free(g->blocks);
    free(g);
}

const dg_result *dg_generator_result(dg_generator *g) { return &g->result; }

static void start_canvas(dg_generator *g) {
    const dg_config *c = &g->session->model->config;
    dg_draw(g->options.seed, g->result.n_blocks, 0, g->n, c->n_vocab, g->u, g->canvas);
    g->index = g->unchanged = 0;
    g->converged = false;
}

static int step(dg_generator *g, dg_event *event, dg_error *error) {
    dg_session *s = g->session;
    const dg_config *c = &s->model->config;
    const ops *o = s->model->ops;
    const float temperature = sampler_temperature(&g->options, g->index);
    const int status = dg_denoise(s, g->canvas, g->n, g->index ? g->z : NULL, g->z, error);
    if (status != DG_OK) return status;
    o->divide(o, g->z, g->z, (int64_t)g->n * c->n_vocab, temperature);
    dg_draw(g->options.seed, g->result.n_blocks, g->index + 1, g->n, c->n_vocab, g->u, g->random_ids);
    o->choose(o, g->choices, g->z, g->n, c->n_vocab, g->u);

    bool same = g->index > 0;
    double sum = 0.0;
    for (int32_t i = 0; i < g->n; i++) {
        same = same && g->argmax[i] == g->choices[i].argmax;
        g->argmax[i] = g->choices[i].argmax;
        g->entropy[i] = g->choices[i].entropy;
        sum += (double)g->entropy[i];
    }
    const float mean = (float)(sum / g->n);
    g->unchanged = same ? g->unchanged + 1 : 0;
    g->converged = sampler_stop(&g->options, g->unchanged, mean);
    sampler_accept(g->entropy, g->n, g->options.entropy_bound, g->accepted, g->order);
    sampler_renoise(g->canvas, g->n, g->choices, g->accepted, g->random_ids);
    *event = (dg_event){
        .kind = DG_EVENT_STEP, .block = g->result.n_blocks, .index = g->index, .temperature = temperature, .n = g->n, .canvas = g->argmax,
        .entropy = g->entropy, .accepted = g->accepted, .mean_entropy = mean, .converged = g->converged,
    };
    g->index++;
    g->phase = g->converged || g->index == g->options.steps ? PHASE_COMMIT : PHASE_STEP;
    return DG_OK;
}

static bool is_end(const dg_config *c, int32_t id) {
    for (int32_t i = 0; i < c->n_end_ids; i++)
        if (c->end_ids[i] == id) return true;
    return false;
}

/* The answer is the argmax canvas, not the noisy one, up to its first end id. */
static void commit(dg_generator *g, dg_event *event) {
    const dg_config *c = &g->session->model->config;
    dg_result *r = &g->result;
    dg_block block = {.steps = g->index, .converged = g->converged};
    for (int32_t i = 0; i < g->n && r->n_ids < g->options.max_tokens; i++) {
        if (is_end(c, g->argmax[i])) {
            r->stopped = true;
            r->end_id = g->argmax[i];
            break;
        }
        g->ids[r->n_ids++] = g->argmax[i];
        block.tokens++;
    }
    *event = (dg_event){
        .kind = DG_EVENT_BLOCK, .block = r->n_blocks, .index = g->index, .n = g->n, .canvas = g->argmax, .entropy = g->entropy,
        .accepted = g->accepted, .converged = g->converged,
    };
    g->blocks[r->n_blocks++] = block;
    r->steps += block.steps;
    r->converged = r->converged && block.converged;
    g->phase = r->stopped || r->n_ids == g->options.max_tokens ? PHASE_DONE : PHASE_NEXT;
}

int dg_generator_next(dg_generator *g, dg_event *event, dg_error *error) {
    int status = DG_OK;
    switch (g->phase) {
        case PHASE_NEXT: status = dg_encode(g->session, g->argmax, g->n, DG_LOGITS_NONE, NULL, error); if (status != DG_OK) return status; /* fall through */
        case PHASE_FIRST: start_canvas(g); /* fall through */
        case PHASE_STEP: return step(g, event, error);
        case PHASE_COMMIT: commit(g, event); return DG_OK;
        case PHASE_DONE: *event = (dg_event){.kind = DG_EVENT_DONE, .block = g->result.n_blocks}; return DG_OK;
    }
    return fail(error, DG_ERROR_USAGE, "a generator in no known phase");
}

/* ---- All in one call ---- */

typedef struct owned_result {
    dg_result result; /* first: the caller's pointer is this */
    dg_generator *generator;
} owned_result;

int dg_generate(dg_session *session, const dg_sampling *sampling, dg_on_event on_event, void *user, dg_result **out, dg_error *error) {
    *out = NULL;
    owned_result *owned = calloc(1, sizeof *owned);
    if (!owned) return fail(error, DG_ERROR_SYSTEM, "no memory for a result");
    int status = dg_generator_new(session, sampling, &owned->generator, error);
    for (dg_event event = {0}; status == DG_OK && event.kind != DG_EVENT_DONE;) {
        status = dg_generator_next(owned->generator, &event, error);
        if (status == DG_OK && on_event && !on_event(&event, user)) status = fail(error, DG_ERROR_STOPPED, "stopped by the caller");
    }
    if (status != DG_OK) {
        dg_result_free(&owned->result);
        return status;
    }
    owned->result = owned->generator->result;
    *out = &owned->result;
    return DG_OK;
}

void dg_result_free(dg_result *result) {
    owned_result *owned = (owned_result *)(void *)result;
    if (!owned) return;
    dg_generator_free(owned->generator);
    free(owned);
}
