/* Block diffusion: canvas after canvas, each refined step by step until it is stable and certain. */
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "error.h"
#include "forward.h"
#include "sampler.h"

enum { MOST_BLOCKS = 1 << 20 };

typedef enum phase { PHASE_FIRST, PHASE_STEP, PHASE_COMMIT, PHASE_NEXT, PHASE_DONE } phase;

struct dg_generator {
    dg_session *session;
    dg_sampling options;
    phase phase;
    int32_t n;              /* length of this canvas */
    int32_t canvas_length;  /* of any canvas, at most */
    int32_t index;          /* of the next step in this canvas */
    int32_t given_up;       /* steps of this canvas's draws before a retry */
    int32_t settled;        /* steps in a row whose answer's part of the argmax canvas was the last one's */
    sampler_low low;
    bool converged;
    bool stepped;           /* the last event was a STEP */
    int32_t pad_id;
    dg_start start;         /* the caller's, copied; n is 0 without one */
    int32_t at;             /* where in it this canvas begins */
    bool *pins;             /* [n] of this canvas */
    bool *fixed;            /* [n] pins, and what `commit` made final */
    int32_t committed;      /* the beginning of the canvas that is final */
    int32_t n_final;        /* ids of the answer in it */
    int8_t *marks;          /* [n] MARK_* of the argmax canvas */
    int32_t *before;        /* [n] the argmax canvas of the step before */
    bool *changed;          /* [n] positions whose argmax is not that */
    canvas_buffers canvas;     /* where ops work */
    canvas_buffers seen;       /* the host's copy of its first arrays, after each step */
    self_cond self_cond;              /* what the last step leaves for the next */
    recording recording;    /* of this canvas's steps after the first, behind so many tokens */
    int32_t recorded_at;
    int32_t *ids;           /* [max blocks * canvas_length] the answer */
    int32_t *places;        /* the same, where there is a start: of each id */
    dg_block *blocks;
    dg_result result;
};

static int check_start(const dg_config *c, const dg_start *start, dg_error *error) {
    if (start->n < 1) return fail(error, DG_ERROR_USAGE, "start: no tokens");
    for (int32_t i = 0; i < start->n; i++)
        if (start->pinned[i] && (start->ids[i] < 0 || start->ids[i] >= c->n_vocab))
            return fail(error, DG_ERROR_USAGE, "pinned token id %d at position %d is outside the vocabulary of %d",
                        start->ids[i], i, c->n_vocab);
    return DG_OK;
}

static bool copy_start(dg_generator *g, const dg_start *start, size_t places) {
    const size_t n = (size_t)start->n;
    int32_t *ids = malloc(n * sizeof *ids);
    bool *pinned = malloc(n * sizeof *pinned);
    g->start = (dg_start){.ids = ids, .pinned = pinned, .n = start->n};
    g->places = malloc(places * sizeof *g->places);
    if (!ids || !pinned || !g->places) return false;
    memcpy(ids, start->ids, n * sizeof *ids);
    memcpy(pinned, start->pinned, n * sizeof *pinned);
    return true;
}

/* The tokens of whole canvases that a session has room for: all but the last are encoded. */
static int32_t room(const dg_session *s) {
    const int64_t n = s->model->config.canvas_length, blocks = (s->context - s->length) / n + 1;
    return (int32_t)(n * (blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS));
}

int dg_generator_new(dg_session *session, const dg_sampling *sampling, dg_generator **out, dg_error *error) {
    return dg_generator_fill(session, sampling, NULL, out, error);
}

int dg_generator_fill(dg_session *session, const dg_sampling *sampling, const dg_start *start, dg_generator **out,
                      dg_error *error) {
    *out = NULL;
    const dg_config *c = &session->model->config;
    if (dg_sampling_check(sampling, error) != DG_OK || (start && check_start(c, start, error) != DG_OK))
        return DG_ERROR_USAGE;
    const int32_t tokens = start ? start->n : sampling->max_tokens ? sampling->max_tokens : room(session);
    const int64_t n = c->canvas_length, blocks = ((int64_t)tokens + n - 1) / n;
    if (session->length < 1)
        return fail(error, DG_ERROR_USAGE, "nothing is encoded: a canvas needs a prompt of at least one token");
    if (blocks > MOST_BLOCKS || session->length + (blocks - 1) * n > session->context)
        return fail(error, DG_ERROR_USAGE, "%s %d does not fit: the context holds %d tokens and has %d",
                    start ? "a start of length" : "max_tokens", tokens, session->context, session->length);
    dg_generator *g = calloc(1, sizeof *g);
    if (!g) return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas");
    const ops *o = session->model->ops;
    const size_t size = (size_t)n;
    *g = (dg_generator){.session = session, .options = *sampling, .n = (int32_t)n, .canvas_length = (int32_t)n};
    g->options.max_tokens = tokens;
    g->pad_id = dg_tokenizer_vocab(dg_model_tokenizer(session->model))->pad_id;
    void *memory = NULL;
    canvas_lay_out(&g->canvas, g->n, c->n_vocab, NULL);
    o->reserve(o, &memory, g->canvas.bytes);
    canvas_lay_out(&g->canvas, g->n, c->n_vocab, memory);
    canvas_lay_out(&g->seen, g->n, c->n_vocab, calloc(1, g->canvas.host_bytes));
    self_cond_lay_out(&g->self_cond, n, c->n_vocab, c->d_model, o->backend->lazy, NULL);
    memory = NULL;
    o->reserve(o, &memory, g->self_cond.bytes);
    self_cond_lay_out(&g->self_cond, n, c->n_vocab, c->d_model, o->backend->lazy, memory);
    g->before = malloc(size * sizeof *g->before);
    g->changed = malloc(size * sizeof *g->changed);
    g->pins = calloc(size, sizeof *g->pins);
    g->fixed = calloc(size, sizeof *g->fixed);
    g->marks = calloc(size, sizeof *g->marks);
    g->ids = malloc((size_t)blocks * size * sizeof *g->ids);
    g->blocks = malloc((size_t)blocks * sizeof *g->blocks);
    const bool copied = !start || copy_start(g, start, (size_t)blocks * size);
    g->result = (dg_result){.ids = g->ids,
                            .places = g->places,
                            .blocks = g->blocks,
                            .end_id = -1,
                            .converged = true,
                            .seed = sampling->seed};
    if (!g->canvas.memory || !g->seen.memory || !g->self_cond.memory || !g->before || !g->changed || !g->pins ||
        !g->fixed || !g->marks || !g->ids || !g->blocks || !copied) {
        dg_generator_free(g);
        const int lost = ops_status(session->model->ops, error);
        if (lost != DG_OK) return lost;
        return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas of %d tokens", c->canvas_length);
    }
    *out = g;
    return DG_OK;
}

void dg_generator_free(dg_generator *g) {
    if (!g) return;
    const ops *o = g->session->model->ops;
    o->graph_free(o, &g->recording);
    o->release(o, g->canvas.memory, g->canvas.bytes);
    o->release(o, g->self_cond.memory, g->self_cond.bytes);
    free(g->seen.memory);
    free(g->before);
    free(g->changed);
    free(g->pins);
    free(g->fixed);
    free(g->marks);
    free((void *)(uintptr_t)g->start.ids);
    free((void *)(uintptr_t)g->start.pinned);
    free(g->places);
    free(g->ids);
    free(g->blocks);
    free(g);
}

const dg_result *dg_generator_result(dg_generator *g) { return &g->result; }

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* A canvas of random ids, with the start's pins in their places. */
static void start_canvas(dg_generator *g) {
    const ops *o = g->session->model->ops;
    g->n = g->canvas_length;
    if (g->start.n) g->n = smaller(g->canvas_length, g->start.n - g->at);
    else if (g->options.short_canvas) g->n = smaller(g->canvas_length, g->options.max_tokens - g->result.n_ids);
    canvas_buffers *c = &g->canvas;
    c->n = c->free = g->n;
    g->committed = g->n_final = 0;
    memset(g->fixed, 0, (size_t)g->n * sizeof *g->fixed);
    for (int32_t i = 0; g->start.n && i < g->n; i++) {
        g->pins[i] = g->fixed[i] = g->start.pinned[g->at + i];
        if (!g->pins[i]) continue;
        g->seen.argmax[i] = g->seen.ids[i] = g->start.ids[g->at + i];
        g->seen.entropy[i] = 0.0f;
        g->seen.accepted[i] = true;
        c->free--;
    }
    if (c->free < c->n) {
        o->upload(o, c->pins, g->pins, (size_t)g->n * sizeof *g->pins);
        o->upload(o, c->ids, g->start.ids + g->at, (size_t)g->n * sizeof *c->ids);
    }
    o->upload(o, c->fixed, g->fixed, (size_t)g->n * sizeof *g->fixed);
    o->graph_free(o, &g->recording); /* the last canvas stood elsewhere */
    o->canvas_init(o, c, g->options.seed, g->result.n_blocks);
    g->self_cond.given = g->options.pins_conditioned ? c->ids : NULL;
    g->self_cond.pinned = c->free < c->n ? c->pins : NULL;
    g->index = g->settled = 0;
    g->self_cond.started = false;
    g->converged = c->free == 0;
}

/* How much of the canvas the answer has room for. */
static int32_t answer_room(const dg_generator *g) {
    return g->start.n ? g->n : smaller(g->n, g->options.max_tokens - g->result.n_ids);
}

/* Marks what the answer has of the argmax canvas, as answer_mark does. */
static int32_t mark_answer(dg_generator *g) {
    return answer_mark(g->marks, g->seen.argmax, g->pins, g->n, answer_room(g), &g->session->model->config,
                       g->start.n ? g->pad_id : -1);
}

/* With `commit`: the beginning of the canvas is final as far as it has settled, and stays what it is at every later
 * step. What stands behind the end of a hole says nothing. Returns whether all of the answer in this canvas is
 * final. */
static bool commit_beginning(dg_generator *g, bool *newly_fixed) {
    *newly_fixed = false;
    if (g->options.commit <= 0.0f) return false;
    const int32_t n = answer_room(g);
    const canvas_buffers *c = &g->seen;
    bool ended = false;
    int32_t i = 0;
    g->n_final = 0;
    for (; i < n; i++) {
        ended = ended && !g->pins[i];
        if (ended) continue;
        if (!g->fixed[i]) {
            if (g->changed[i] || !(c->entropy[i] <= g->options.commit)) break;
            g->fixed[i] = *newly_fixed = true;
        }
        if (g->marks[i] == MARK_PIN || g->marks[i] == MARK_TOKEN) g->ids[g->result.n_ids + g->n_final++] = c->argmax[i];
        ended = g->marks[i] == MARK_END;
    }
    g->committed = i;
    return i == n;
}

/* The next canvas again, after another acceptance: what is fixed stays, and is accepted. */
static void renoise(dg_generator *g) {
    const ops *o = g->session->model->ops;
    for (int32_t i = 0; i < g->n; i++) g->seen.accepted[i] = g->seen.accepted[i] || g->fixed[i];
    o->upload(o, g->canvas.accepted, g->seen.accepted, (size_t)g->n * sizeof *g->seen.accepted);
    o->canvas_renoise(o, &g->canvas);
    o->download(o, g->seen.ids, g->canvas.ids, (size_t)g->n * sizeof *g->seen.ids);
}

/* After a step that was brought to the host: makes the stop tests that are about the answer, and the event. */
static void end_step(dg_generator *g, dg_event *event) {
    const ops *o = g->session->model->ops;
    const canvas_buffers *c = &g->seen;
    bool newly_fixed;
    for (int32_t i = 0; i < g->n; i++) g->changed[i] = g->index == 0 || g->before[i] != c->argmax[i];
    mark_answer(g);
    const bool answered = answer_settled(&g->options, c->entropy, g->changed, g->marks, g->n, &g->settled);
    const bool final = commit_beginning(g, &newly_fixed);
    const bool plateau = sampler_plateau(&g->options, g->index, c->state->mean_entropy, &g->low);
    if (newly_fixed) {
        o->upload(o, g->canvas.fixed, g->fixed, (size_t)g->n * sizeof *g->fixed);
        renoise(g);
    }
    g->converged = final || answered || c->state->converged;
    *event = (dg_event){
        .kind = DG_EVENT_STEP,
        .block = g->result.n_blocks,
        .index = g->index,
        .temperature = c->state->temperature,
        .n = g->n,
        .place = g->at,
        .canvas = c->argmax,
        .entropy = c->entropy,
        .accepted = c->accepted,
        .next = c->ids,
        .mean_entropy = c->state->mean_entropy,
        .converged = g->converged,
        .final = g->ids + g->result.n_ids,
        .n_final = g->n_final,
    };
    g->index++;
    g->stepped = true;
    g->phase = g->converged || plateau || g->index == g->options.steps ? PHASE_COMMIT : PHASE_STEP;
}

int dg_generator_accept(dg_generator *g, const bool *accepted, dg_error *error) {
    if (!g->stepped) return fail(error, DG_ERROR_USAGE, "accept: the generator is not behind a step");
    memcpy(g->seen.accepted, accepted, (size_t)g->n * sizeof *accepted);
    renoise(g);
    return ops_status(g->session->model->ops, error);
}

/* The same ops, whatever the step: they read what changes between steps from the canvases. */
static int step_ops(dg_generator *const *g, int32_t count, const pass *p, head_part *heads, dg_error *error) {
    const ops *o = p->model->ops;
    int64_t first = 0;
    for (int32_t i = 0; i < count; i++) {
        o->copy(o, p->scratch->ids + first, g[i]->canvas.ids, (size_t)g[i]->n * sizeof(int32_t));
        first += g[i]->n;
    }
    int status = forward_denoise(p, error);
    if (status != DG_OK) return status;
    for (int32_t i = 0; i < count; i++) {
        canvas_buffers *c = &g[i]->canvas;
        o->canvas_draw(o, c, &g[i]->options);
        heads[i] = (head_part){
            .n = c->n, .temperature = &c->state->temperature, .u = c->u, .out = c->choices, .next = &g[i]->self_cond};
    }
    status = forward_choose(p, heads, error);
    for (int32_t i = 0; status == DG_OK && i < count; i++) o->canvas_step(o, &g[i]->canvas, &g[i]->options);
    return status;
}

/* Brings a step to the host; a device's numbers are looked at only now. */
static int fetch(dg_generator *const *g, int32_t count, const pass *p, dg_error *error) {
    const ops *o = p->model->ops;
    int32_t *argmax = p->later ? malloc((size_t)p->n * sizeof *argmax) : NULL;
    int64_t first = 0;
    if (p->later && !argmax) return fail(error, DG_ERROR_SYSTEM, "no memory for a step");
    for (int32_t i = 0; i < count; i++) {
        memcpy(g[i]->before, g[i]->seen.argmax, (size_t)g[i]->n * sizeof *argmax);
        o->download(o, g[i]->seen.memory, g[i]->canvas.memory, g[i]->canvas.host_bytes);
        if (argmax) memcpy(argmax + first, g[i]->seen.argmax, (size_t)g[i]->n * sizeof *argmax);
        first += g[i]->n;
    }
    int status = ops_status(o, error);
    if (status == DG_OK && p->later) status = forward_verdict(p, argmax, error);
    free(argmax);
    return status;
}

/* One step of several generators, in one pass. */
static int step_together(dg_generator *const *g, int32_t count, dg_event *events, dg_error *error) {
    dg_model *model = g[0]->session->model;
    const ops *o = model->ops;
    pass_part *parts = calloc((size_t)count, sizeof *parts);
    head_part *heads = calloc((size_t)count, sizeof *heads);
    int64_t n = 0;
    for (int32_t i = 0; parts && i < count; i++) {
        parts[i] = (pass_part){.session = g[i]->session, .n = g[i]->n, .last = g[i]->index ? &g[i]->self_cond : NULL};
        n += g[i]->n;
    }
    scratch *r = NULL;
    int status = parts && heads ? session_scratch(g[0]->session, n, &r, error)
                                : fail(error, DG_ERROR_SYSTEM, "no memory for a step");
    if (status == DG_OK) {
        const pass p = {
            .model = model, .scratch = r, .parts = parts, .n_parts = count, .n = n, .later = o->backend->asynchronous};
        const bool recordable = count == 1 && g[0]->index > 0; /* a first step has no self-conditioning */
        bool replayed = false;
        if (recordable && g[0]->recorded_at != g[0]->session->length) o->graph_free(o, &g[0]->recording);
        g[0]->recorded_at = g[0]->session->length;
        if (recordable) o->graph_begin(o, &g[0]->recording, &replayed);
        if (!replayed) status = step_ops(g, count, &p, heads, error);
        if (recordable && !replayed) o->graph_end(o, &g[0]->recording);
        if (recordable && status != DG_OK) o->graph_free(o, &g[0]->recording); /* it may hold half a step */
        if (status == DG_OK) status = fetch(g, count, &p, error);
        for (int32_t i = 0; status == DG_OK && i < count; i++) end_step(g[i], &events[i]);
        if (status == DG_OK) status = ops_status(o, error);
    }
    free(heads);
    free(parts);
    return status;
}

/* The answer is the argmax canvas, not the noisy one, up to its first end id: what mark_answer marks. Returns its
 * fault. */
static dg_fault read_answer(dg_generator *g, dg_block *block, int32_t *end) {
    const dg_result *r = &g->result;
    *block = (dg_block){.steps = g->given_up + g->index, .converged = g->converged};
    *end = mark_answer(g);
    for (int32_t i = 0; i < g->n; i++) {
        if (g->marks[i] != MARK_PIN && g->marks[i] != MARK_TOKEN) continue;
        if (g->places) g->places[r->n_ids + block->tokens] = g->at + i;
        g->ids[r->n_ids + block->tokens++] = g->seen.argmax[i];
    }
    return g->start.n ? DG_FAULT_NONE : answer_fault(g->ids + r->n_ids, block->tokens, g->n, r->n_ids, g->pad_id);
}

static void commit(dg_generator *g, const dg_block *block, int32_t end, dg_event *event) {
    dg_result *r = &g->result;
    *event = (dg_event){
        .kind = DG_EVENT_BLOCK,
        .block = r->n_blocks,
        .index = block->steps,
        .n = g->n,
        .place = g->at,
        .canvas = g->seen.argmax,
        .entropy = g->seen.entropy,
        .accepted = g->seen.accepted,
        .next = g->seen.ids,
        .converged = g->converged,
        .final = g->ids + r->n_ids,
        .n_final = block->tokens,
    };
    g->blocks[r->n_blocks++] = *block;
    r->n_ids += block->tokens;
    r->steps += block->steps;
    r->converged = r->converged && block->converged;
    g->given_up = 0;
    if (g->start.n) { /* a hole that has ended does not go on in the next canvas */
        g->at += g->n;
        while (end >= 0 && g->at < g->start.n && !g->start.pinned[g->at]) g->at++;
    }
    const bool done = g->start.n ? g->at == g->start.n : end >= 0 || r->n_ids == g->options.max_tokens;
    if (done) {
        r->stopped = end >= 0 || g->pins[g->n - 1];
        r->end_id = end >= 0 ? g->seen.argmax[end] : -1;
    }
    g->phase = done ? PHASE_DONE : PHASE_NEXT;
}

/* Commits the canvas and returns true; or prepares to draw it again from the next seed: then there is no event. */
static bool commit_or_retry(dg_generator *g, dg_event *event) {
    dg_block block;
    int32_t end;
    block.fault = (int32_t)read_answer(g, &block, &end);
    /* what is final is not taken back */
    if (block.fault == DG_FAULT_NONE || g->committed > 0 || g->result.retries == g->options.retries) {
        commit(g, &block, end, event);
        return true;
    }
    g->given_up = block.steps;
    g->result.retries++;
    g->result.seed = ++g->options.seed;
    g->phase = PHASE_FIRST;
    return false;
}

/* Brings a generator to its next step, or to an event that needs none. */
static int advance(dg_generator *g, dg_event *event, bool *at_step, dg_error *error) {
    *at_step = g->stepped = false;
    if (g->phase == PHASE_DONE) {
        *event = (dg_event){.kind = DG_EVENT_DONE, .block = g->result.n_blocks};
        return DG_OK;
    }
    if (g->phase == PHASE_COMMIT && commit_or_retry(g, event)) return DG_OK;
    if (g->phase == PHASE_NEXT) {
        const int32_t tokens = g->blocks[g->result.n_blocks - 1].tokens;
        const int status =
            tokens == 0 ? DG_OK
                        : dg_encode(g->session, g->ids + g->result.n_ids - tokens, tokens, DG_LOGITS_NONE, NULL, error);
        if (status != DG_OK) return status;
    }
    if (g->phase != PHASE_STEP) start_canvas(g);
    if (g->canvas.free == 0) { /* all is pinned: no step is needed */
        commit_or_retry(g, event);
        return DG_OK;
    }
    g->phase = PHASE_STEP;
    *at_step = true;
    return DG_OK;
}

int dg_generators_next(dg_generator *const *generators, int32_t count, dg_event *events, dg_error *error) {
    for (int32_t i = 0; i < count; i++)
        for (int32_t j = 0; j <= i; j++) {
            if (generators[j]->session->model != generators[i]->session->model)
                return fail(error, DG_ERROR_USAGE, "generator %d is of another model", i);
            if (j < i && generators[j]->session == generators[i]->session)
                return fail(error, DG_ERROR_USAGE, "generators %d and %d are of one session", j, i);
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
    if (status == DG_OK && n > 0) status = step_together(ready, n, taken, error);
    for (int32_t i = 0; status == DG_OK && i < n; i++) events[places[i]] = taken[i];
    free(ready);
    free(taken);
    free(places);
    return status;
}

int dg_generator_next(dg_generator *g, dg_event *event, dg_error *error) {
    return dg_generators_next(&g, 1, event, error);
}

/* ---- All in one call ---- */

typedef struct owned_result {
    dg_result result; /* first: the caller's pointer is this */
    dg_generator *generator;
} owned_result;

int dg_generate(dg_session *session, const dg_sampling *sampling, dg_on_event on_event, void *user, dg_result **out,
                dg_error *error) {
    *out = NULL;
    owned_result *owned = calloc(1, sizeof *owned);
    if (!owned) return fail(error, DG_ERROR_SYSTEM, "no memory for a result");
    int status = dg_generator_new(session, sampling, &owned->generator, error);
    if (!owned->generator) {
        dg_result_free(&owned->result);
        return status;
    }
    dg_event event = {0};
    while (status == DG_OK && event.kind != DG_EVENT_DONE) {
        status = dg_generator_next(owned->generator, &event, error);
        if (status == DG_OK && on_event && !on_event(&event, user))
            status = fail(error, DG_ERROR_STOPPED, "stopped by the caller");
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
