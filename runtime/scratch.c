#include "scratch.h"

#include "carve.h"
#include "error.h"

enum { LEAST_ROWS = 256 }; /* of a pass, where canvases are shorter */

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static void lay_out(const dg_model *m, int64_t n, scratch *s) {
    const dg_config *c = &m->config;
    const int64_t d = c->d_model;
    const int64_t wide = m->ops->backend->lazy ? c->n_vocab : smaller(c->n_vocab, SELF_COND_STRETCH);
    int64_t d_q = 0, d_kv = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        d_q = larger(d_q, config_d_q(c, l));
        d_kv = larger(d_kv, config_d_kv(c, l));
    }
    const size_t products = matmul_work(n, larger(larger(d, c->d_ffn), d_q)) + self_condition_work(n, d);
    const size_t mixture = experts_work(n, c->n_expert_used, d, c->d_expert, c->n_expert);
#define CARVE(items, size) carve(s->memory, &s->bytes, items, size)
    s->bytes = 0;
    s->x = CARVE(n * d, sizeof *s->x);
    s->h = CARVE(n * d, sizeof *s->h);
    s->a = CARVE(n * d, sizeof *s->a);
    s->q = CARVE(n * d_q, sizeof *s->q);
    s->o = CARVE(n * d_q, sizeof *s->o);
    s->k = CARVE(n * d_kv, sizeof *s->k);
    s->v = CARVE(n * d_kv, sizeof *s->v);
    s->gate = CARVE(n * c->d_ffn, sizeof *s->gate);
    s->up = CARVE(n * c->d_ffn, sizeof *s->up);
    s->dense = CARVE(n * d, sizeof *s->dense);
    s->sparse = CARVE(n * d, sizeof *s->sparse);
    s->scores = CARVE(n * c->n_expert, sizeof *s->scores);
    s->shares = CARVE(n * c->n_expert_used, sizeof *s->shares);
    s->experts = CARVE(n * c->n_expert_used, sizeof *s->experts);
    s->ids = CARVE(n, sizeof *s->ids);
    s->products = CARVE(1, products);
    s->mixture = CARVE(1, mixture);
    s->vocabulary = CARVE(n * (wide + 4), sizeof *s->vocabulary);
    s->nonfinite = CARVE(1, sizeof *s->nonfinite);
#undef CARVE
}

int scratch_new(const dg_model *model, int64_t n, scratch *s, dg_error *error) {
    const ops *o = model->ops;
    *s = (scratch){0};
    lay_out(model, n, s);
    o->reserve(o, &s->memory, s->bytes);
    const int lost = s->memory ? DG_OK : ops_status(o, error);
    if (lost != DG_OK) return lost;
    if (!s->memory)
        return fail(error, DG_ERROR_SYSTEM, "no memory for a pass of %lld rows: %llu bytes%s", (long long)n,
                    (unsigned long long)s->bytes, o->backend->lazy ? " of address space" : "");
    lay_out(model, n, s);
    return DG_OK;
}

void scratch_free(const dg_model *model, scratch *s) {
    model->ops->release(model->ops, s->memory, s->bytes);
    s->memory = NULL;
}

int32_t scratch_rows(const dg_model *model) { return (int32_t)larger(model->config.canvas_length, LEAST_ROWS); }

size_t scratch_cache(const dg_model *model, int32_t context, void *memory, void **k, void **v) {
    const dg_config *c = &model->config;
    size_t used = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        const int64_t numbers = ((int64_t)context + c->canvas_length) * config_d_kv(c, l);
        k[l] = carve(memory, &used, numbers, (size_t)model->ops->key_bytes);
        v[l] = carve(memory, &used, numbers, (size_t)model->ops->key_bytes);
    }
    return used;
}

int64_t scratch_cache_bytes(const dg_model *model, int32_t context) {
    void *k[DG_MAX_LAYERS], *v[DG_MAX_LAYERS];
    return (int64_t)scratch_cache(model, context, NULL, k, v);
}

int64_t scratch_pass_bytes(const dg_model *model, int64_t n) {
    scratch s = {0};
    lay_out(model, n, &s);
    return (int64_t)s.bytes;
}

int64_t scratch_canvas_bytes(const dg_model *model) {
    const dg_config *c = &model->config;
    self_cond s;
    canvas_buffers r;
    self_cond_lay_out(&s, c->canvas_length, c->n_vocab, c->d_model, model->ops->backend->lazy, NULL);
    canvas_lay_out(&r, c->canvas_length, c->n_vocab, NULL);
    return (int64_t)(s.bytes + r.bytes);
}

int64_t scratch_session_bytes(const dg_model *model, int32_t context) {
    return scratch_cache_bytes(model, context) + scratch_pass_bytes(model, scratch_rows(model)) +
           scratch_canvas_bytes(model);
}
