/* The forward pass: one set of weights, read causally by the encoder and in both directions by the decoder. */
#include <math.h>

#include "session.h"

static const float *floats(const tensor *t) { return (const float *)(const void *)t->data; }

/* out = down(gelu(gate x) * up x) */
static void mlp(dg_session *s, float *out, const float *x, const tensor *gate, const tensor *up, const tensor *down, int64_t n) {
    const ops *o = s->model->ops;
    room *r = &s->room;
    o->matmul(o, r->gate, x, gate, n, r->products);
    o->matmul(o, r->up, x, up, n, r->products);
    o->gelu_mul(o, r->gate, r->gate, r->up, n * gate->rows);
    o->matmul(o, out, r->gate, down, n, r->products);
}

/* Keys and values of room.h into the cache, behind what is encoded. */
static void keys_and_values(dg_session *s, int32_t l, int64_t n) {
    const dg_config *c = &s->model->config;
    const layer *w = &s->model->layers[l];
    const ops *o = s->model->ops;
    const int64_t dim = config_head_dim(c, l), heads = c->n_head_kv[l];
    float *k = s->k[l] + s->length * heads * dim, *v = s->v[l] + s->length * heads * dim;
    o->matmul(o, k, s->room.h, &w->attn_k, n, s->room.products);
    if (c->sliding[l]) o->matmul(o, v, s->room.h, &w->attn_v, n, s->room.products);
    o->rms_norm(o, v, c->sliding[l] ? v : k, NULL, n * heads, dim, c->rms_eps); /* full layers: V is the raw K projection */
    o->rms_norm(o, k, k, floats(&w->attn_k_norm), n * heads, dim, c->rms_eps);
    o->rope(o, k, n, heads, dim, s->length, c->sliding[l] ? s->model->rope_swa : s->model->rope_full);
}

/* room.a = room.x + the attention of room.h */
static void attend(dg_session *s, int32_t l, int64_t n, bool causal) {
    const dg_config *c = &s->model->config;
    const layer *w = &s->model->layers[l];
    const ops *o = s->model->ops;
    room *r = &s->room;
    const int64_t dim = config_head_dim(c, l), d = c->d_model;
    o->matmul(o, r->q, r->h, &w->attn_q, n, r->products);
    o->rms_norm(o, r->q, r->q, floats(&w->attn_q_norm), n * c->n_head, dim, c->rms_eps);
    o->rope(o, r->q, n, c->n_head, dim, s->length, c->sliding[l] ? s->model->rope_swa : s->model->rope_full);
    const attention_keys keys = {
        .k = s->k[l], .v = s->v[l], .n_kv = c->n_head_kv[l], .first = s->length, .count = s->length + n,
        .causal = causal, .window = c->sliding[l] ? c->sliding_window : 0,
    };
    o->attention(o, r->o, r->q, &keys, n, c->n_head, dim);
    o->matmul(o, r->a, r->o, &w->attn_output, n, r->products);
    o->rms_norm(o, r->a, r->a, floats(&w->post_attention_norm), n, d, c->rms_eps);
    o->add(o, r->a, r->a, r->x, n, d, 1.0f);
}

/* room.x = (room.a + the dense and the expert FFN of room.a) * scalar */
static void feed_forward(dg_session *s, int32_t l, int64_t n, float scalar) {
    const dg_config *c = &s->model->config;
    const layer *w = &s->model->layers[l];
    const ops *o = s->model->ops;
    room *r = &s->room;
    const int64_t d = c->d_model;

    o->rms_norm(o, r->h, r->a, floats(&w->ffn_norm), n, d, c->rms_eps);
    mlp(s, r->dense, r->h, &w->ffn_gate, &w->ffn_up, &w->ffn_down, n);
    o->rms_norm(o, r->dense, r->dense, floats(&w->post_ffw_norm_1), n, d, c->rms_eps);

    /* the router reads the stream itself, normed without a weight */
    o->rms_norm(o, r->h, r->a, NULL, n, d, c->rms_eps);
    o->mul(o, r->h, r->h, floats(&w->ffn_gate_inp_scale), n, d, 1.0f / sqrtf((float)d));
    o->matmul(o, r->scores, r->h, &w->ffn_gate_inp, n, r->products);
    o->route(o, r->experts, r->shares, r->scores, floats(&w->ffn_down_exps_scale), n, c->n_expert, c->n_expert_used);

    o->rms_norm(o, r->h, r->a, floats(&w->pre_ffw_norm_2), n, d, c->rms_eps);
    o->experts(o, r->sparse, r->h, &w->ffn_gate_exps, &w->ffn_up_exps, &w->ffn_down_exps, r->experts, r->shares, n, c->n_expert_used, r->mixture);
    o->rms_norm(o, r->sparse, r->sparse, floats(&w->post_ffw_norm_2), n, d, c->rms_eps);

    o->add(o, r->dense, r->dense, r->sparse, n, d, 1.0f);
    o->rms_norm(o, r->dense, r->dense, floats(&w->post_ffw_norm), n, d, c->rms_eps);
    o->add(o, r->x, r->a, r->dense, n, d, scalar);
}

void forward_encode(dg_session *s, const int32_t *ids, int32_t n, bool output) {
    const dg_model *m = s->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    o->embed(o, s->room.x, &m->top.token_embd, ids, n, sqrtf((float)c->d_model));
    for (int32_t l = 0; l < c->n_layer; l++) {
        const layer *w = &m->layers[l];
        o->rms_norm(o, s->room.h, s->room.x, floats(&w->attn_norm), n, c->d_model, c->rms_eps);
        keys_and_values(s, l, n);
        if (l == c->n_layer - 1 && !output) break; /* the decoder reads the cache alone */
        attend(s, l, n, true);
        feed_forward(s, l, n, *floats(&w->enc_layer_output_scale));
    }
}

/* room.x += the self-conditioning of the previous step's scaled logits */
static void self_condition(dg_session *s, const float *z, int64_t n) {
    const dg_model *m = s->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    room *r = &s->room;
    o->condition(o, r->h, z, &m->top.token_embd, n, sqrtf((float)c->d_model), r->soft);
    o->rms_norm(o, r->h, r->h, floats(&m->top.self_cond_pre_norm), n, c->d_model, c->rms_eps);
    mlp(s, r->dense, r->h, &m->top.self_cond_gate, &m->top.self_cond_up, &m->top.self_cond_down, n);
    o->add(o, r->x, r->x, r->dense, n, c->d_model, 1.0f);
}

void forward_denoise(dg_session *s, const int32_t *canvas, int32_t n, const float *condition) {
    const dg_model *m = s->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    o->embed(o, s->room.x, &m->top.token_embd, canvas, n, sqrtf((float)c->d_model));
    if (condition) self_condition(s, condition, n);
    o->rms_norm(o, s->room.x, s->room.x, NULL, n, c->d_model, c->rms_eps); /* the canvas alone has this norm */
    for (int32_t l = 0; l < c->n_layer; l++) {
        const layer *w = &m->layers[l];
        o->rms_norm(o, s->room.h, s->room.x, floats(&w->attn_norm), n, c->d_model, c->rms_eps);
        keys_and_values(s, l, n);
        attend(s, l, n, false);
        feed_forward(s, l, n, *floats(&w->layer_output_scale));
    }
}

void forward_logits(dg_session *s, int32_t first, int32_t n, float *logits) {
    const dg_model *m = s->model;
    const dg_config *c = &m->config;
    const ops *o = m->ops;
    o->rms_norm(o, s->room.h, s->room.x + (int64_t)first * c->d_model, floats(&m->top.output_norm), n, c->d_model, c->rms_eps);
    o->matmul(o, logits, s->room.h, &m->top.token_embd, n, s->room.products);
    o->softcap(o, logits, (int64_t)n * c->n_vocab, c->softcap);
}
