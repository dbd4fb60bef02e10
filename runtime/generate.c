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
    soft soft;              /* what the last step leaves for the next */
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
    *g = (dg_generator){.session = session, .options = *sampling, .n = (int32_t)n};
    g->canvas = malloc(size * sizeof *g->canvas);
    g->argmax = malloc(size * sizeof *g->argmax);
    g->order = malloc(2 * size * sizeof *g->order);
    g->random_ids = malloc(size * sizeof *g->random_ids);
    g->u = malloc(size * sizeof *g->u);
    g->choices = malloc(size * sizeof *g->choices);
    g->entropy = malloc(size * sizeof *g->entropy);
    g->accepted = malloc(size * sizeof *g->accepted);
    g->ids = malloc((size_t)blocks * size * sizeof *g->ids);
    g->blocks = malloc((size_t)blocks * sizeof *g->blocks);
    g->result = (dg_result){.ids = g->ids, .blocks = g->blocks, .end_id = -1, .converged = true};
    if (!g->canvas || !g->argmax || !g->order || !g->random_ids || !g->u || !g->choices || !g->entropy || !g->accepted || !g->ids || !g->blocks ||
        soft_new(n, c->n_vocab, c->d_model, &g->soft, error) != DG_OK) {
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
    soft_free(&g->soft);
    free(g->ids);
    free(g->blocks);
    free(g);
}

const dg_result *dg_generator_result(dg_generator *g) { return &g->result; }

static void start_canvas(dg_generator *g) {
    const dg_config *c = &g->session->model->config;
    dg_draw(g->options.seed, g->result.n_blocks, 0, g->n, c->n_vocab, g->u, g->canvas);
    g->index = g->unchanged = 0;
    g->soft.started = false;
    g->converged = false;
}

/* What follows from a step's choices: acceptance, the next canvas, the stop test. */
static void settle(dg_generator *g, float temperature, dg_event *event) {
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
}

/* One step of several generators, in one pass. */
static int steps(dg_generator *const *g, int32_t count, dg_event *events, dg_error *error) {
    dg_model *model = g[0]->session->model;
    const int32_t n_vocab = model->config.n_vocab;
    pass_part *parts = calloc((size_t)count, sizeof *parts);
    head_part *heads = calloc((size_t)count, sizeof *heads);
    int64_t n = 0;
    for (int32_t i = 0; parts && i < count; i++) {
        parts[i] = (pass_part){.session = g[i]->session, .n = g[i]->n, .last = g[i]->index ? &g[i]->soft : NULL};
        n += g[i]->n;
    }
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    room *r = NULL;
    int status = parts && heads && ids ? DG_OK : fail(error, DG_ERROR_SYSTEM, "no memory for a step");
    if (status == DG_OK) status = session_room(g[0]->session, n, &r, error);
    if (status == DG_OK) {
        const pass p = {model, r, parts, count, n};
        int64_t first = 0;
        for (int32_t i = 0; i < count; first += g[i++]->n) memcpy(ids + first, g[i]->canvas, (size_t)g[i]->n * sizeof *ids);
        forward_denoise(&p, ids);
        for (int32_t i = 0; i < count; i++) {
            dg_draw(g[i]->options.seed, g[i]->result.n_blocks, g[i]->index + 1, g[i]->n, n_vocab, g[i]->u, g[i]->random_ids);
            heads[i] = (head_part){g[i]->n, sampler_temperature(&g[i]->options, g[i]->index), g[i]->u, g[i]->choices, &g[i]->soft};
        }
        forward_choose(&p, heads);
        for (int32_t i = 0; i < count; i++) settle(g[i], heads[i].temperature, &events[i]);
    }
    free(heads);
    free(parts);
    free(ids);
    return status;
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

/* Brings a generator to its next step, or to an event that needs none. */
static int advance(dg_generator *g, dg_event *event, bool *at_step, dg_error *error) {
    *at_step = false;
    if (g->phase == PHASE_COMMIT) {
        commit(g, event);
        return DG_OK;
    }
    if (g->phase == PHASE_DONE) {
        *event = (dg_event){.kind = DG_EVENT_DONE, .block = g->result.n_blocks};
        return DG_OK;
    }
    if (g->phase == PHASE_NEXT) {
        const int status = dg_encode(g->session, g->argmax, g->n, DG_LOGITS_NONE, NULL, error);
        if (status != DG_OK) return status;
    }
    if (g->phase != PHASE_STEP) start_canvas(g);
    g->phase = PHASE_STEP;
    *at_step = true;
    return DG_OK;
}

int dg_generators_next(dg_generator *const *generators, int32_t count, dg_event *events, dg_error *error) {
    for (int32_t i = 0; i < count; i++)
        for (int32_t j = 0; j <= i; j++) {
            if (generators[j]->session->model != generators[i]->session->model) return fail(error, DG_ERROR_USAGE, "generator %d is of another model", i);
            if (j < i && generators[j]->session == generators[i]->session) return fail(error, DG_ERROR_USAGE, "generators %d and %d are of one session", j, i);
        }
    dg_generator **ready = malloc((size_t)(count > 0 ? count : 1) * sizeof *ready);
    dg_event *taken = malloc((size_t)(count > 0 ? count : 1) * sizeof *taken);
    int32_t *places = malloc((size_t)(count > 0 ? count : 1) * sizeof *places), n = 0;
    int status = ready && taken && places ? DG_OK : fail(error, DG_ERROR_SYSTEM, "no memory for a step");
    for (int32_t i = 0; status == DG_OK && i < count; i++) {
        bool at_step;
        status = advance(generators[i], &events[i], &at_step, error);
        if (status == DG_OK && at_step) {
            ready[n] = generators[i];
            places[n++] = i;
        }
    }
    if (status == DG_OK && n > 0) status = steps(ready, n, taken, error);
    for (int32_t i = 0; status == DG_OK && i < n; i++) events[places[i]] = taken[i];
    free(ready);
    free(taken);
    free(places);
    return status;
}

int dg_generator_next(dg_generator *g, dg_event *event, dg_error *error) { return dg_generators_next(&g, 1, event, error); }

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
