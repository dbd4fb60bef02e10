#include "session.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { DEFAULT_CONTEXT = 8192, ALIGNMENT = 64 };

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Hands out the next `bytes`, or only counts them while there is no memory yet. */
static void *carve(dg_session *s, size_t bytes) {
    void *at = s->memory ? s->memory + s->bytes : NULL;
    s->bytes += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

static void lay_out(dg_session *s) {
    const dg_config *c = &s->model->config;
    room *r = &s->room;
    const size_t n = (size_t)s->rows, f = sizeof(float), kept = (size_t)s->context + (size_t)c->canvas_length;
    size_t d = (size_t)c->d_model, d_q = 0;
    s->bytes = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        const size_t row = (size_t)config_d_kv(c, l) * f;
        d_q = (size_t)larger((int64_t)d_q, config_d_q(c, l));
        s->k[l] = carve(s, kept * row);
        s->v[l] = carve(s, kept * row);
    }
    r->x = carve(s, n * d * f);
    r->h = carve(s, n * d * f);
    r->a = carve(s, n * d * f);
    r->q = carve(s, n * d_q * f);
    r->o = carve(s, n * d_q * f);
    r->gate = carve(s, n * (size_t)c->d_ffn * f);
    r->up = carve(s, n * (size_t)c->d_ffn * f);
    r->dense = carve(s, n * d * f);
    r->sparse = carve(s, n * d * f);
    r->scores = carve(s, n * (size_t)c->n_expert * f);
    r->shares = carve(s, n * (size_t)c->n_expert_used * f);
    r->experts = carve(s, n * (size_t)c->n_expert_used * sizeof(int32_t));
    r->products = carve(s, matmul_work(s->rows, larger(larger(c->d_model, c->d_ffn), (int64_t)d_q)));
    r->mixture = carve(s, experts_work(s->rows, c->n_expert_used, c->d_model, c->d_expert, c->n_expert));
    r->soft = carve(s, n * (size_t)c->n_vocab * f);
}

int dg_session_new(dg_model *model, int32_t context, dg_session **out, dg_error *error) {
    *out = NULL;
    const dg_config *c = &model->config;
    if (context == 0) context = c->context_length < DEFAULT_CONTEXT ? c->context_length : DEFAULT_CONTEXT;
    if (context < 1 || context > c->context_length)
        return fail(error, DG_ERROR_USAGE, "context: expected 1 to %d tokens (the model's), got %d", c->context_length, context);
    dg_session *s = calloc(1, sizeof *s);
    if (!s) return fail(error, DG_ERROR_SYSTEM, "no memory for a session");
    s->model = model;
    s->context = context;
    s->rows = (int32_t)larger(c->canvas_length, SESSION_ROWS);
    s->k = calloc((size_t)c->n_layer, sizeof *s->k);
    s->v = calloc((size_t)c->n_layer, sizeof *s->v);
    if (s->k && s->v) {
        lay_out(s);
        s->memory = os_reserve(s->bytes);
    }
    if (!s->memory) {
        const unsigned long long bytes = s->bytes;
        dg_session_free(s);
        return fail(error, DG_ERROR_SYSTEM, "no memory for a session of %d tokens: %llu bytes of address space", context, bytes);
    }
    lay_out(s);
    *out = s;
    return DG_OK;
}

void dg_session_free(dg_session *s) {
    if (!s) return;
    os_release(s->memory, s->bytes);
    free(s->k);
    free(s->v);
    free(s);
}

int32_t dg_session_length(const dg_session *s) { return s->length; }
int32_t dg_session_context(const dg_session *s) { return s->context; }

int dg_session_rewind(dg_session *s, int32_t length, dg_error *error) {
    if (length < 0 || length > s->length)
        return fail(error, DG_ERROR_USAGE, "rewind: expected 0 to %d (the tokens encoded), got %d", s->length, length);
    s->length = length;
    return DG_OK;
}

static int check_ids(const dg_session *s, const int32_t *ids, int32_t n, dg_error *error) {
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.n_vocab)
            return fail(error, DG_ERROR_USAGE, "token id %d at position %d is outside the vocabulary of %d", ids[i], i, s->model->config.n_vocab);
    return DG_OK;
}

int dg_encode(dg_session *s, const int32_t *ids, int32_t n, int32_t which, float *logits, dg_error *error) {
    const dg_config *c = &s->model->config;
    if (n < 1) return fail(error, DG_ERROR_USAGE, "encode: no tokens");
    if (which < DG_LOGITS_NONE || which > DG_LOGITS_ALL) return fail(error, DG_ERROR_USAGE, "encode: unknown choice of logits %d", which);
    if (n > s->context - s->length)
        return fail(error, DG_ERROR_USAGE, "%d tokens do not fit: the context holds %d and has %d", n, s->context, s->length);
    if (check_ids(s, ids, n, error) != DG_OK) return DG_ERROR_USAGE;
    for (int32_t done = 0; done < n;) {
        const int32_t rows = n - done < s->rows ? n - done : s->rows;
        const bool last = done + rows == n;
        const bool output = which == DG_LOGITS_ALL || (which == DG_LOGITS_LAST && last);
        forward_encode(s, ids + done, rows, output);
        if (which == DG_LOGITS_ALL) forward_logits(s, 0, rows, logits + (int64_t)done * c->n_vocab);
        else if (output) forward_logits(s, rows - 1, 1, logits);
        done += rows;
        s->length += rows;
    }
    return DG_OK;
}

int dg_denoise(dg_session *s, const int32_t *canvas, int32_t n, const float *condition, float *logits, dg_error *error) {
    const dg_config *c = &s->model->config;
    if (n < 1 || n > c->canvas_length) return fail(error, DG_ERROR_USAGE, "canvas: expected 1 to %d tokens, got %d", c->canvas_length, n);
    if (check_ids(s, canvas, n, error) != DG_OK) return DG_ERROR_USAGE;
    forward_denoise(s, canvas, n, condition);
    forward_logits(s, 0, n, logits);
    return DG_OK;
}
