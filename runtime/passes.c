/* The passes that a caller asks for: encoding tokens, and denoising canvases once. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "forward.h"

static int check_ids(const dg_session *s, const int32_t *ids, int32_t n, dg_error *error) {
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.n_vocab)
            return fail(error, DG_ERROR_USAGE, "token id %d at position %d is outside the vocabulary of %d", ids[i], i,
                        s->model->config.n_vocab);
    return DG_OK;
}

int dg_encode(dg_session *s, const int32_t *ids, int32_t n, int32_t which, float *logits, dg_error *error) {
    const dg_config *c = &s->model->config;
    if (n < 1) return fail(error, DG_ERROR_USAGE, "encode: no tokens");
    if (which < DG_LOGITS_NONE || which > DG_LOGITS_ALL)
        return fail(error, DG_ERROR_USAGE, "encode: unknown choice of logits %d", which);
    if (n > s->context - s->length)
        return fail(error, DG_ERROR_USAGE, "%d tokens do not fit: the context holds %d and has %d", n, s->context,
                    s->length);
    if (check_ids(s, ids, n, error) != DG_OK) return DG_ERROR_USAGE;
    const int32_t before = s->length;
    for (int32_t done = 0; done < n;) {
        const int32_t rows = n - done < s->rows ? n - done : s->rows;
        const bool last = done + rows == n;
        const bool output = which == DG_LOGITS_ALL || (which == DG_LOGITS_LAST && last);
        const pass_part own = {.session = s, .n = rows};
        const pass p = {.model = s->model, .scratch = &s->scratch, .parts = &own, .n_parts = 1, .n = rows};
        int status = forward_encode(&p, ids + done, output, error);
        if (status == DG_OK && which == DG_LOGITS_ALL)
            status = forward_logits(&p, 0, rows, logits + (int64_t)done * c->n_vocab, error);
        else if (status == DG_OK && output) status = forward_logits(&p, rows - 1, 1, logits, error);
        if (status != DG_OK) {
            s->length = before;
            return status;
        }
        done += rows;
        s->length += rows;
    }
    return ops_status(s->model->ops, error);
}

static int check_canvas(const dg_session *s, const int32_t *canvas, int32_t n, const float *condition,
                        dg_error *error) {
    const int32_t most = s->model->config.canvas_length, n_vocab = s->model->config.n_vocab;
    if (n < 1 || n > most) return fail(error, DG_ERROR_USAGE, "canvas: expected 1 to %d tokens, got %d", most, n);
    for (int32_t i = 0; condition && i < n; i++) {
        bool numbers = true;
        /* NaN is not */
        for (int64_t v = 0; v < n_vocab; v++) numbers &= condition[(int64_t)i * n_vocab + v] < INFINITY;
        if (!numbers) return fail(error, DG_ERROR_USAGE, "condition: NaN or infinity in row %d", i);
    }
    return check_ids(s, canvas, n, error);
}

int dg_denoise(dg_session *s, const int32_t *canvas, int32_t n, const float *condition, float *logits,
               dg_error *error) {
    const dg_canvas one = {.session = s, .canvas = canvas, .n = n, .condition = condition, .logits = logits};
    return dg_denoise_batch(&one, 1, error);
}

int dg_denoise_hidden(dg_session *s, const int32_t *canvas, int32_t n, const float *condition, float *hidden,
                      dg_error *error) {
    if (check_canvas(s, canvas, n, condition, error) != DG_OK) return DG_ERROR_USAGE;
    const pass_part own = {.session = s, .n = n, .condition = condition};
    const pass p = {.model = s->model, .scratch = &s->scratch, .parts = &own, .n_parts = 1, .n = n, .hidden = hidden};
    s->model->ops->upload(s->model->ops, s->scratch.ids, canvas, (size_t)n * sizeof *canvas);
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
            if (canvases[j].session == c->session)
                return fail(error, DG_ERROR_USAGE, "denoise: canvases %d and %d are of one session", j, i);
        if (check_canvas(c->session, c->canvas, c->n, c->condition, error) != DG_OK) return DG_ERROR_USAGE;
        n += c->n;
    }
    pass_part *parts = calloc((size_t)count, sizeof *parts);
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    scratch *r = NULL;
    int status = parts && ids ? DG_OK : fail(error, DG_ERROR_SYSTEM, "no memory for %d canvases", count);
    if (status == DG_OK) status = session_scratch(canvases[0].session, n, &r, error);
    if (status == DG_OK) {
        int64_t first = 0;
        for (int32_t i = 0; i < count; i++) {
            parts[i] =
                (pass_part){.session = canvases[i].session, .n = canvases[i].n, .condition = canvases[i].condition};
            memcpy(ids + first, canvases[i].canvas, (size_t)canvases[i].n * sizeof *ids);
            first += canvases[i].n;
        }
        const pass p = {.model = model, .scratch = r, .parts = parts, .n_parts = count, .n = n};
        model->ops->upload(model->ops, r->ids, ids, (size_t)n * sizeof *ids);
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
