#include "session.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "budget.h"
#include "error.h"
#include "tables.h"

enum { DEFAULT_CONTEXT = 8192, ALIGNMENT = 64 };

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static double gibibytes(int64_t bytes) { return (double)bytes / (1 << 30); }

/* Hands out the next `bytes` behind *used, or only counts them while there is no memory yet. */
static void *carve(void *memory, size_t *used, size_t bytes) {
    void *at = memory ? (char *)memory + *used : NULL;
    *used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

/* ---- Rooms ---- */

static void lay_out_room(const dg_model *m, int64_t rows, room *r) {
    const dg_config *c = &m->config;
    const size_t n = (size_t)rows, f = sizeof(float), d = (size_t)c->d_model;
    int64_t d_q = 0, d_kv = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        d_q = larger(d_q, config_d_q(c, l));
        d_kv = larger(d_kv, config_d_kv(c, l));
    }
#define CARVE(size) carve(r->memory, &r->bytes, size)
    r->bytes = 0;
    r->x = CARVE(n * d * f);
    r->h = CARVE(n * d * f);
    r->a = CARVE(n * d * f);
    r->q = CARVE(n * (size_t)d_q * f);
    r->o = CARVE(n * (size_t)d_q * f);
    r->k = CARVE(n * (size_t)d_kv * f);
    r->v = CARVE(n * (size_t)d_kv * f);
    r->gate = CARVE(n * (size_t)c->d_ffn * f);
    r->up = CARVE(n * (size_t)c->d_ffn * f);
    r->dense = CARVE(n * d * f);
    r->sparse = CARVE(n * d * f);
    r->scores = CARVE(n * (size_t)c->n_expert * f);
    r->shares = CARVE(n * (size_t)c->n_expert_used * f);
    r->experts = CARVE(n * (size_t)c->n_expert_used * sizeof(int32_t));
    r->ids = CARVE(n * sizeof(int32_t));
    r->products = CARVE(matmul_work(rows, larger(larger(c->d_model, c->d_ffn), d_q)) + soften_work(rows, c->d_model));
    r->mixture = CARVE(experts_work(rows, c->n_expert_used, c->d_model, c->d_expert, c->n_expert));
    r->vocabulary = CARVE(n * (size_t)(m->ops->lazy || c->n_vocab < SOFT_STRETCH ? c->n_vocab : SOFT_STRETCH) * f + n * 4 * f);
    r->found = CARVE(sizeof(int32_t));
#undef CARVE
}

int room_new(const dg_model *model, int64_t n, room *r, dg_error *error) {
    *r = (room){0};
    lay_out_room(model, n, r);
    model->ops->reserve(model->ops, &r->memory, r->bytes);
    const int lost = r->memory ? DG_OK : ops_status(model->ops, error);
    if (lost != DG_OK) return lost;
    if (!r->memory)
        return fail(error, DG_ERROR_SYSTEM, "no memory for a pass of %lld rows: %llu bytes%s", (long long)n, (unsigned long long)r->bytes,
                    model->ops->lazy ? " of address space" : "");
    lay_out_room(model, n, r);
    return DG_OK;
}

void room_free(const dg_model *model, room *r) {
    model->ops->release(model->ops, r->memory, r->bytes);
    r->memory = NULL;
}

/* ---- Sessions ---- */

static void lay_out_cache(dg_session *s) {
    const dg_config *c = &s->model->config;
    s->bytes = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        const size_t bytes = ((size_t)s->context + (size_t)c->canvas_length) * (size_t)config_d_kv(c, l) * (size_t)s->model->ops->key_bytes;
        s->k[l] = carve(s->memory, &s->bytes, bytes);
        s->v[l] = carve(s->memory, &s->bytes, bytes);
    }
}

int32_t session_rows(const dg_model *model) { return (int32_t)larger(model->config.canvas_length, SESSION_ROWS); }

int64_t session_cache_bytes(const dg_model *model, int32_t context) {
    void *rows[2][DG_MAX_LAYERS];
    dg_session s = {.model = (dg_model *)(uintptr_t)model, .context = context, .k = rows[0], .v = rows[1]};
    lay_out_cache(&s);
    return (int64_t)s.bytes;
}

static int64_t room_bytes(const dg_model *model, int64_t n) {
    room r = {0};
    lay_out_room(model, n, &r);
    return (int64_t)r.bytes;
}

int64_t session_room_bytes(const dg_model *model) { return room_bytes(model, session_rows(model)); }

int64_t session_canvas_bytes(const dg_model *model) {
    const dg_config *c = &model->config;
    soft s;
    canvas_room r;
    soft_lay_out(&s, c->canvas_length, c->n_vocab, c->d_model, model->ops->lazy, NULL);
    canvas_lay_out(&r, c->canvas_length, c->n_vocab, NULL);
    return (int64_t)(s.bytes + r.bytes);
}

int64_t session_bytes(const dg_model *model, int32_t context) {
    return session_cache_bytes(model, context) + session_room_bytes(model) + session_canvas_bytes(model);
}

int64_t dg_session_bytes(const dg_model *model, int32_t tokens) { return session_bytes(model, tokens); }

int session_context(const dg_model *model, int32_t *context, dg_error *error) {
    const int32_t most = model->config.context_length;
    if (*context == 0) *context = budget_context(model, most < DEFAULT_CONTEXT ? most : DEFAULT_CONTEXT);
    if (*context < 1 || *context > most) return fail(error, DG_ERROR_USAGE, "context: expected 1 to %d tokens (the model's), got %d", most, *context);
    return DG_OK;
}

int dg_session_new(dg_model *model, int32_t context, dg_session **out, dg_error *error) {
    *out = NULL;
    const dg_config *c = &model->config;
    if (session_context(model, &context, error) != DG_OK) return DG_ERROR_USAGE;
    dg_session *s = calloc(1, sizeof *s);
    if (!s) return fail(error, DG_ERROR_SYSTEM, "no memory for a session");
    s->model = model;
    s->context = context;
    s->rows = session_rows(model);
    s->k = calloc((size_t)c->n_layer, sizeof *s->k);
    s->v = calloc((size_t)c->n_layer, sizeof *s->v);
    char what[64], parts[200];
    const int64_t bytes = session_bytes(model, context), cache = session_cache_bytes(model, context);
    snprintf(what, sizeof what, "a session of %d tokens", context);
    snprintf(parts, sizeof parts, " (keys and values of its context of %d: %.2f GiB; room to work in, with '%s' %d: %.2f GiB)", context, gibibytes(cache), key_name(KEY_canvas_length),
             c->canvas_length, gibibytes(bytes - cache));
    int status = budget_take(model, bytes, what, parts, error);
    if (status == DG_OK) s->counted = bytes;
    if (status == DG_OK) status = room_new(model, s->rows, &s->room, error);
    if (status == DG_OK && s->k && s->v) {
        lay_out_cache(s);
        model->ops->reserve(model->ops, &s->memory, s->bytes);
        status = ops_status(model->ops, error);
    }
    if (status == DG_OK && !s->memory)
        status = fail(error, DG_ERROR_SYSTEM, "no memory for a session of %d tokens: %llu bytes%s", context, (unsigned long long)s->bytes,
                      model->ops->lazy ? " of address space" : "");
    if (status != DG_OK) {
        dg_session_free(s);
        return status;
    }
    lay_out_cache(s);
    *out = s;
    return DG_OK;
}

void dg_session_free(dg_session *s) {
    if (!s) return;
    room_free(s->model, &s->room);
    room_free(s->model, &s->together);
    s->model->ops->release(s->model->ops, s->memory, s->bytes);
    budget_give(s->model, s->counted);
    free(s->k);
    free(s->v);
    free(s);
}

int session_room(dg_session *s, int64_t n, room **out, dg_error *error) {
    *out = n <= s->rows ? &s->room : &s->together;
    if (n <= s->rows || n <= s->together_rows) return DG_OK;
    const int64_t had = s->together_rows ? room_bytes(s->model, s->together_rows) : 0, bytes = room_bytes(s->model, n);
    char what[64];
    snprintf(what, sizeof what, "a pass over %lld tokens at once", (long long)n);
    int status = budget_take(s->model, bytes - had, what, "", error);
    if (status != DG_OK) return status;
    s->counted += bytes - had;
    room_free(s->model, &s->together);
    s->together_rows = 0;
    status = room_new(s->model, n, &s->together, error);
    if (status == DG_OK) s->together_rows = n;
    return status;
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
        const pass_part own = {.session = s, .n = rows};
        const pass p = {s->model, &s->room, &own, 1, rows, NULL, false, false};
        int status = forward_encode(&p, ids + done, output, error);
        if (status == DG_OK && which == DG_LOGITS_ALL) status = forward_logits(&p, 0, rows, logits + (int64_t)done * c->n_vocab, error);
        else if (status == DG_OK && output) status = forward_logits(&p, rows - 1, 1, logits, error);
        if (status != DG_OK) return status;
        done += rows;
        s->length += rows;
    }
    return ops_status(s->model->ops, error);
}

static int check_canvas(const dg_session *s, const int32_t *canvas, int32_t n, const float *condition, dg_error *error) {
    const int32_t most = s->model->config.canvas_length, n_vocab = s->model->config.n_vocab;
    if (n < 1 || n > most) return fail(error, DG_ERROR_USAGE, "canvas: expected 1 to %d tokens, got %d", most, n);
    for (int32_t i = 0; condition && i < n; i++) {
        bool numbers = true;
        for (int64_t v = 0; v < n_vocab; v++) numbers &= condition[(int64_t)i * n_vocab + v] < INFINITY; /* NaN is not */
        if (!numbers) return fail(error, DG_ERROR_USAGE, "condition: NaN or infinity in row %d", i);
    }
    return check_ids(s, canvas, n, error);
}

int dg_denoise(dg_session *s, const int32_t *canvas, int32_t n, const float *condition, float *logits, dg_error *error) {
    const dg_canvas one = {s, canvas, n, condition, logits};
    return dg_denoise_batch(&one, 1, error);
}

int dg_denoise_hidden(dg_session *s, const int32_t *canvas, int32_t n, const float *condition, float *hidden, dg_error *error) {
    if (check_canvas(s, canvas, n, condition, error) != DG_OK) return DG_ERROR_USAGE;
    const pass_part own = {.session = s, .n = n, .condition = condition};
    const pass p = {s->model, &s->room, &own, 1, n, hidden, false, false};
    s->model->ops->put(s->model->ops, s->room.ids, canvas, (size_t)n * sizeof *canvas);
    const int status = forward_denoise(&p, error);
    return status == DG_OK ? ops_status(s->model->ops, error) : status;
}

int dg_denoise_batch(const dg_canvas *canvases, int32_t count, dg_error *error) {
    if (count < 1) return fail(error, DG_ERROR_USAGE, "denoise: no canvases");
    dg_model *model = canvases[0].session->model;
    int64_t n = 0;
    for (int32_t i = 0; i < count; i++) {
        const dg_canvas *c = &canvases[i];
        if (c->session->model != model) return fail(error, DG_ERROR_USAGE, "denoise: canvas %d is of another model", i);
        for (int32_t j = 0; j < i; j++)
            if (canvases[j].session == c->session) return fail(error, DG_ERROR_USAGE, "denoise: canvases %d and %d are of one session", j, i);
        if (check_canvas(c->session, c->canvas, c->n, c->condition, error) != DG_OK) return DG_ERROR_USAGE;
        n += c->n;
    }
    pass_part *parts = calloc((size_t)count, sizeof *parts);
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    room *r = NULL;
    int status = parts && ids ? DG_OK : fail(error, DG_ERROR_SYSTEM, "no memory for %d canvases", count);
    if (status == DG_OK) status = session_room(canvases[0].session, n, &r, error);
    if (status == DG_OK) {
        int64_t first = 0;
        for (int32_t i = 0; i < count; i++) {
            parts[i] = (pass_part){.session = canvases[i].session, .n = canvases[i].n, .condition = canvases[i].condition};
            memcpy(ids + first, canvases[i].canvas, (size_t)canvases[i].n * sizeof *ids);
            first += canvases[i].n;
        }
        const pass p = {model, r, parts, count, n, NULL, false, false};
        model->ops->put(model->ops, r->ids, ids, (size_t)n * sizeof *ids);
        status = forward_denoise(&p, error);
        first = 0;
        for (int32_t i = 0; status == DG_OK && i < count; i++) {
            status = forward_logits(&p, first, canvases[i].n, canvases[i].logits, error);
            first += canvases[i].n;
        }
    }
    free(parts);
    free(ids);
    return status == DG_OK ? ops_status(model->ops, error) : status;
}
