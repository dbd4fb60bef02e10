/* The forward pass: one set of weights, read causally by the encoder and in both directions by the decoder. */
#include "forward.h"

#include <math.h>

#include "error.h"
#include "memory/stream.h"
#include "profile.h"

/* Where ops read it, and where the host does. */
static const float *floats(const tensor *t) { return (const float *)(const void *)(t->placed ? t->placed : t->data); }
static float number(const tensor *t) { return *(const float *)(const void *)t->data; }

/* ---- Checks for NaN and infinity ---- */

typedef enum finite_check {
#define DG_FINITE_CHECK(name, always, what) CHECK_##name,
#include "finite_checks.def"
#undef DG_FINITE_CHECK
    FINITE_CHECKS
} finite_check;

static const struct {
    bool always;
    const char *what;
} finite_checks[FINITE_CHECKS] = {
#define DG_FINITE_CHECK(name, always, what) {always, what},
#include "finite_checks.def"
#undef DG_FINITE_CHECK
};

/* x[rows of the pass][d] of a layer (0 outside of layers) */
static void check_finite(const pass *p, finite_check at, int32_t l, const float *x, int64_t rows, int64_t d) {
    if (finite_checks[at].always || p->closely)
        p->model->ops->check_finite(p->model->ops, p->scratch->nonfinite, x, rows * d,
                                    1 + l * FINITE_CHECKS + (int32_t)at);
}

static int32_t nonfinite(const pass *p) {
    int32_t mark = 0; /* which it stays where the backend is lost */
    p->model->ops->download(p->model->ops, &mark, p->scratch->nonfinite, sizeof mark);
    return mark;
}

static void set_nonfinite(const pass *p, int32_t mark) {
    p->model->ops->upload(p->model->ops, p->scratch->nonfinite, &mark, sizeof mark);
}

static int report_nonfinite(const pass *p, dg_error *error) {
    const int32_t at = (nonfinite(p) - 1) % FINITE_CHECKS, l = (nonfinite(p) - 1) / FINITE_CHECKS;
    const char *path = p->model->file->path;
    const bool outside = at == CHECK_embedding || at == CHECK_conditioned || at == CHECK_last_norm || at == CHECK_head;
    if (outside)
        return fail(error, DG_ERROR_NUMBERS,
                    "%s: NaN or infinity in %s: the weights are damaged, or the numbers too large", path,
                    finite_checks[at].what);
    return fail(error, DG_ERROR_NUMBERS,
                "%s: layer %d: NaN or infinity in %s: the weights are damaged, or the numbers too large", path, l,
                finite_checks[at].what);
}

/* Whether the results of a pass are valid: after a file shrank they may come from zeros, and after a backend failed
 * they may be anything. */
static int verdict(const pass *p, dg_error *error) {
    int status = gguf_check(p->model->file, error);
    if (status == DG_OK) status = ops_status(p->model->ops, error);
    return status == DG_OK && nonfinite(p) ? report_nonfinite(p, error) : status;
}

/* ---- Layers ---- */

/* out = down(gelu(gate x) * up x) */
static void mlp(const pass *p, float *out, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                int64_t n) {
    const ops *o = p->model->ops;
    scratch *r = p->scratch;
    o->matmul(o, r->gate, x, gate, n, r->products);
    o->matmul(o, r->up, x, up, n, r->products);
    o->gelu_mul(o, r->gate, r->gate, r->up, n * gate->rows);
    o->matmul(o, out, r->gate, down, n, r->products);
}

/* Keys and values of scratch.h into each part's cache, behind what is encoded. Uses scratch.k and scratch.v. */
static void keys_and_values(const pass *p, int32_t l) {
    const dg_config *c = &p->model->config;
    const layer *w = &p->model->layers[l];
    const ops *o = p->model->ops;
    const scratch *r = p->scratch;
    const int64_t dim = config_head_dim(c, l), heads = c->n_head_kv[l], row = heads * dim;
    float *k = r->k, *v = r->v;
    profile_part = PART_projections;
    check_finite(p, CHECK_input, l, r->h, p->n, c->d_model);
    o->matmul(o, r->k, r->h, &w->attn_k, p->n, r->products);
    if (c->sliding[l]) o->matmul(o, r->v, r->h, &w->attn_v, p->n, r->products);
    for (int32_t i = 0; i < p->n_parts; i++) {
        const dg_session *s = p->parts[i].session;
        const int64_t n = p->parts[i].n;
        /* full layers: V is the raw K projection */
        o->rms_norm(o, v, c->sliding[l] ? v : k, NULL, n * heads, dim, c->rms_eps);
        o->rms_norm(o, k, k, floats(&w->attn_k_norm), n * heads, dim, c->rms_eps);
        o->rope(o, k, n, heads, dim, s->length, c->sliding[l] ? p->model->rope_swa : p->model->rope_full);
        check_finite(p, CHECK_keys, l, k, n, row);
        check_finite(p, CHECK_values, l, v, n, row);
        o->store(o, s->k[l], s->length, k, n, row);
        o->store(o, s->v[l], s->length, v, n, row);
        k += n * row;
        v += n * row;
    }
}

/* scratch.a = scratch.x + the attention of scratch.h */
static void attend(const pass *p, int32_t l, bool causal) {
    const dg_config *c = &p->model->config;
    const layer *w = &p->model->layers[l];
    const ops *o = p->model->ops;
    scratch *r = p->scratch;
    const int64_t dim = config_head_dim(c, l), d = c->d_model, row = config_d_q(c, l);
    o->matmul(o, r->q, r->h, &w->attn_q, p->n, r->products);
    o->rms_norm(o, r->q, r->q, floats(&w->attn_q_norm), p->n * c->n_head, dim, c->rms_eps);
    float *q = r->q, *y = r->o;
    for (int32_t i = 0; i < p->n_parts; i++) {
        const dg_session *s = p->parts[i].session;
        const int64_t n = p->parts[i].n;
        const attention_keys keys = {
            .k = s->k[l],
            .v = s->v[l],
            .n_kv = c->n_head_kv[l],
            .first = s->length,
            .count = s->length + n,
            .causal = causal,
            .window = c->sliding[l] ? c->sliding_window : 0,
        };
        o->rope(o, q, n, c->n_head, dim, s->length, c->sliding[l] ? p->model->rope_swa : p->model->rope_full);
        check_finite(p, CHECK_queries, l, q, n, row);
        o->attention(o, y, q, &keys, n, c->n_head, dim);
        q += n * row;
        y += n * row;
    }
    check_finite(p, CHECK_attention, l, r->o, p->n, row);
    o->matmul(o, r->a, r->o, &w->attn_output, p->n, r->products);
    o->rms_norm(o, r->a, r->a, floats(&w->post_attention_norm), p->n, d, c->rms_eps);
    o->add(o, r->a, r->a, r->x, p->n, d, 1.0f);
    check_finite(p, CHECK_attended, l, r->a, p->n, d);
}

/* scratch.x = (scratch.a + the dense and the expert FFN of scratch.a) * scalar */
static void feed_forward(const pass *p, int32_t l, float scalar) {
    const dg_config *c = &p->model->config;
    const layer *w = &p->model->layers[l];
    const ops *o = p->model->ops;
    scratch *r = p->scratch;
    const int64_t n = p->n, d = c->d_model;

    profile_part = PART_dense;
    o->rms_norm(o, r->h, r->a, floats(&w->ffn_norm), n, d, c->rms_eps);
    mlp(p, r->dense, r->h, &w->ffn_gate, &w->ffn_up, &w->ffn_down, n);
    o->rms_norm(o, r->dense, r->dense, floats(&w->post_ffw_norm_1), n, d, c->rms_eps);
    check_finite(p, CHECK_dense, l, r->dense, n, d);

    profile_part = PART_router;
    /* the router reads the stream itself, normed without a weight */
    o->rms_norm(o, r->h, r->a, NULL, n, d, c->rms_eps);
    o->mul(o, r->h, r->h, floats(&w->ffn_gate_inp_scale), n, d, 1.0f / sqrtf((float)d));
    o->matmul(o, r->scores, r->h, &w->ffn_gate_inp, n, r->products);
    check_finite(p, CHECK_router, l, r->scores, n, c->n_expert);
    o->route(o, r->experts, r->shares, r->scores, floats(&w->ffn_down_exps_scale), n, c->n_expert, c->n_expert_used);
    o->routing_add(o, p->model->routing + (int64_t)l * c->n_expert, r->experts, n * c->n_expert_used);

    profile_part = PART_experts;
    o->rms_norm(o, r->h, r->a, floats(&w->pre_ffw_norm_2), n, d, c->rms_eps);
    expert_feed feed;
    if (p->model->stream) feed = stream_experts(p->model->stream, l, r->experts, n * c->n_expert_used);
    o->experts(o, r->sparse, r->h, &w->ffn_gate_exps, &w->ffn_up_exps, &w->ffn_down_exps, r->experts, r->shares, n,
               c->n_expert_used, p->model->stream ? &feed : NULL, r->mixture);
    o->rms_norm(o, r->sparse, r->sparse, floats(&w->post_ffw_norm_2), n, d, c->rms_eps);
    check_finite(p, CHECK_experts, l, r->sparse, n, d);

    o->add(o, r->dense, r->dense, r->sparse, n, d, 1.0f);
    o->rms_norm(o, r->dense, r->dense, floats(&w->post_ffw_norm), n, d, c->rms_eps);
    o->add(o, r->x, r->a, r->dense, n, d, scalar);
    check_finite(p, CHECK_output, l, r->x, n, d);
}

/* Whether all sessions of a pass shall stop. */
static bool stops(const pass *p) {
    int32_t i = 0;
    while (i < p->n_parts && session_stops(p->parts[i].session)) i++;
    return i == p->n_parts;
}

/* Waits for a layer's own weights, or those outside of layers (-1); false where they cannot be read. */
static bool weights_of(const dg_model *m, int32_t l) { return !m->stream || stream_layer(m->stream, l); }

/* Returns false where it was stopped before its last layer. */
static bool encode(const pass *p, const int32_t *ids, bool output) {
    const dg_model *m = p->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    scratch *r = p->scratch;
    if (!weights_of(m, -1)) return true;
    o->upload(o, r->ids, ids, (size_t)p->n * sizeof *ids);
    o->embed(o, r->x, &m->top.token_embd, r->ids, p->n, sqrtf((float)c->d_model));
    check_finite(p, CHECK_embedding, 0, r->x, p->n, c->d_model);
    for (int32_t l = 0; l < c->n_layer && weights_of(m, l); l++) {
        if (stops(p)) return false;
        const layer *w = &m->layers[l];
        o->rms_norm(o, r->h, r->x, floats(&w->attn_norm), p->n, c->d_model, c->rms_eps);
        keys_and_values(p, l);
        if (l == c->n_layer - 1 && !output) break; /* the decoder reads the cache alone */
        attend(p, l, true);
        feed_forward(p, l, number(&w->enc_layer_output_scale));
    }
    return true;
}

/* Begins a pass of the stream, for this number of layers, and ends it. */
static void begin(const pass *p, int32_t layers) {
    const dg_model *m = p->model;
    m->ops->begin_pass(m->ops, layers, p->scratch->nonfinite);
    if (m->stream) stream_begin(m->stream, layers);
}
static int end(const dg_model *m, bool whole, dg_error *error) {
    const int status = m->stream ? stream_end(m->stream, error) : DG_OK;
    m->ops->end_pass(m->ops);
    return status == DG_OK && !whole ? fail(error, DG_ERROR_STOPPED, "stopped by the caller") : status;
}

static int encode_once(const pass *p, const int32_t *ids, bool output, dg_error *error) {
    const dg_model *m = p->model;
    begin(p, m->config.n_layer - (output ? 0 : 1));
    return end(m, encode(p, ids, output), error);
}

int forward_encode(const pass *p, const int32_t *ids, bool output, dg_error *error) {
    pass again = *p;
    again.closely = true;
    int status = encode_once(p, ids, output, error);
    if (status == DG_OK && nonfinite(p)) status = encode_once(&again, ids, output, error);
    return status == DG_OK ? verdict(p, error) : status;
}

/* scratch.x += the self-conditioning of the parts that have one */
static void self_condition(const pass *p) {
    const dg_model *m = p->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    scratch *r = p->scratch;
    const float scale = sqrtf((float)c->d_model);
    profile_part = PART_condition;
    int64_t first = 0;
    for (int32_t i = 0; i < p->n_parts; i++) {
        const pass_part *its = &p->parts[i];
        float *x = r->x + first * c->d_model;
        if (its->condition)
            o->self_condition_dense(o, r->h, its->condition, &m->top.token_embd, its->n, scale, r->vocabulary);
        else if (its->last)
            o->self_condition(o, r->h, its->last, &m->top.token_embd, its->n, scale, r->products, r->vocabulary);
        if (its->condition || its->last) {
            o->rms_norm(o, r->h, r->h, floats(&m->top.self_cond_pre_norm), its->n, c->d_model, c->rms_eps);
            mlp(p, r->dense, r->h, &m->top.self_cond_gate, &m->top.self_cond_up, &m->top.self_cond_down, its->n);
            o->add(o, x, x, r->dense, its->n, c->d_model, 1.0f);
        }
        first += its->n;
    }
    profile_part = PART_elementwise;
}

/* Copies scratch.x to p->hidden, if the caller wants hidden states. */
static void show(const pass *p, int32_t l) {
    const dg_model *m = p->model;
    const int64_t n = p->n * m->config.d_model;
    if (p->hidden) m->ops->download(m->ops, p->hidden + l * n, p->scratch->x, (size_t)n * sizeof *p->hidden);
}

/* Returns false where it was stopped before its last layer. */
static bool denoise(const pass *p) {
    const dg_model *m = p->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    scratch *r = p->scratch;
    if (!weights_of(m, -1)) return true;
    o->embed(o, r->x, &m->top.token_embd, r->ids, p->n, sqrtf((float)c->d_model));
    check_finite(p, CHECK_embedding, 0, r->x, p->n, c->d_model);
    self_condition(p);
    check_finite(p, CHECK_conditioned, 0, r->x, p->n, c->d_model);
    o->rms_norm(o, r->x, r->x, NULL, p->n, c->d_model, c->rms_eps); /* the canvas alone has this norm */
    for (int32_t l = 0; l < c->n_layer && weights_of(m, l); l++) {
        if (stops(p)) return false;
        const layer *w = &m->layers[l];
        show(p, l);
        o->rms_norm(o, r->h, r->x, floats(&w->attn_norm), p->n, c->d_model, c->rms_eps);
        keys_and_values(p, l);
        attend(p, l, false);
        feed_forward(p, l, number(&w->layer_output_scale));
    }
    show(p, c->n_layer);
    return true;
}

static int denoise_once(const pass *p, dg_error *error) {
    const dg_model *m = p->model;
    begin(p, m->config.n_layer);
    return end(m, denoise(p), error);
}

int forward_denoise(const pass *p, dg_error *error) {
    pass again = *p;
    again.closely = true;
    int status = denoise_once(p, error);
    if (p->later) return status;
    if (status == DG_OK && nonfinite(p)) status = denoise_once(&again, error);
    return status == DG_OK ? verdict(p, error) : status;
}

/* scratch.h[n] = the output norm of rows from `first` on */
static void output_norm(const pass *p, int64_t first, int64_t n) {
    const dg_model *m = p->model;
    const dg_config *c = &m->config;
    profile_part = PART_head;
    m->ops->rms_norm(m->ops, p->scratch->h, p->scratch->x + first * c->d_model, floats(&m->top.output_norm), n,
                     c->d_model, c->rms_eps);
}

/* Finds whether the output norm of rows or the head produced the NaN or infinity. */
static int report_head(pass p, int64_t rows, dg_error *error) {
    p.closely = true;
    set_nonfinite(&p, 0);
    check_finite(&p, CHECK_last_norm, 0, p.scratch->h, rows, p.model->config.d_model);
    if (!nonfinite(&p)) set_nonfinite(&p, 1 + CHECK_head);
    return verdict(&p, error);
}

int forward_logits(const pass *p, int64_t first, int64_t n, float *logits, dg_error *error) {
    const dg_model *m = p->model;
    const ops *o = m->ops;
    output_norm(p, first, n);
    o->logits(o, logits, p->scratch->h, &m->top.token_embd, n, m->config.softcap, p->scratch->nonfinite, 1 + CHECK_head,
              p->scratch->products, p->scratch->vocabulary);
    return nonfinite(p) ? report_head(*p, n, error) : verdict(p, error);
}

int forward_choose(const pass *p, const head_part *parts, dg_error *error) {
    const dg_model *m = p->model;
    const ops *o = m->ops;
    output_norm(p, 0, p->n);
    o->head(o, parts, p->n_parts, p->scratch->h, &m->top.token_embd, p->n, m->config.softcap, p->scratch->products);
    for (int32_t i = 0; !p->later && i < p->n_parts; i++)
        for (int64_t k = 0; k < parts[i].n; k++)
            if (parts[i].out[k].argmax < 0) return report_head(*p, p->n, error);
    return p->later ? DG_OK : verdict(p, error);
}

int forward_verdict(const pass *p, const int32_t *argmax, dg_error *error) {
    pass again = *p;
    again.closely = true;
    again.later = true;
    if (nonfinite(p)) {
        const int32_t coarse = nonfinite(p);
        const int status = denoise_once(&again, error); /* from the same ids; what conditioned them may have moved on */
        if (status != DG_OK) return status;
        if (!nonfinite(p)) set_nonfinite(p, coarse);
        return verdict(p, error);
    }
    for (int64_t i = 0; i < p->n; i++)
        if (argmax[i] < 0) return report_head(*p, p->n, error);
    return verdict(p, error);
}
