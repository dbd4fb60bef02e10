#include "session.h"

#include <stdio.h>
#include <stdlib.h>

#include "error.h"
#include "memory/budget.h"
#include "memory/demand.h"
#include "lists.h"

enum { ASK_EVERY = 20000000 /* nanoseconds */ };

static double gibibytes(int64_t bytes) { return (double)bytes / (1 << 30); }

int64_t dg_session_bytes(const dg_model *model, int32_t tokens) { return scratch_session_bytes(model, tokens); }

int64_t dg_session_room(const dg_model *model) { return budget_room(model); }

/* Checks a session's length in tokens, and sets it where it is 0: the longest that is usual and that there is room
 * for. */
static int check_context(const dg_model *model, int32_t *context, dg_error *error) {
    const int32_t most = model->config.context_length;
    if (*context == 0) *context = budget_context(model, most < DG_USUAL_CONTEXT ? most : DG_USUAL_CONTEXT);
    if (*context < 1 || *context > most)
        return fail(error, DG_ERROR_USAGE, "context: expected 1 to %d tokens (the model's), got %d", most, *context);
    return DG_OK;
}

int dg_session_new(dg_model *model, int32_t context, dg_session **out, dg_error *error) {
    *out = NULL;
    const dg_config *c = &model->config;
    if (check_context(model, &context, error) != DG_OK) return DG_ERROR_USAGE;
    dg_session *s = calloc(1, sizeof *s);
    if (!s) return fail(error, DG_ERROR_SYSTEM, "no memory for a session");
    s->model = model;
    s->context = context;
    s->rows = scratch_rows(model);
    s->k = calloc((size_t)c->n_layer, sizeof *s->k);
    s->v = calloc((size_t)c->n_layer, sizeof *s->v);
    char what[64], parts[200];
    const int64_t bytes = scratch_session_bytes(model, context), cache = scratch_cache_bytes(model, context);
    snprintf(what, sizeof what, "a session of %d tokens", context);
    snprintf(parts, sizeof parts,
             " (keys and values of its context of %d: %.2f GiB; room to work in, with '%s' %d: %.2f GiB)", context,
             gibibytes(cache), key_name(KEY_canvas_length), c->canvas_length, gibibytes(bytes - cache));
    int status = budget_take(model, bytes, what, parts, error);
    if (status == DG_OK) s->counted = bytes;
    if (status == DG_OK) status = scratch_new(model, s->rows, &s->scratch, error);
    if (status == DG_OK && s->k && s->v) {
        s->bytes = (size_t)cache;
        model->ops->reserve(model->ops, &s->memory, s->bytes);
        status = ops_status(model->ops, error);
    }
    if (status == DG_OK && !s->memory)
        status = fail(error, DG_ERROR_SYSTEM, "no memory for a session of %d tokens: %llu bytes%s", context,
                      (unsigned long long)s->bytes, model->ops->backend->lazy ? " of address space" : "");
    if (status != DG_OK) {
        dg_session_free(s);
        return status;
    }
    scratch_cache(model, context, s->memory, s->k, s->v);
    *out = s;
    return DG_OK;
}

void dg_session_free(dg_session *s) {
    if (!s) return;
    scratch_free(s->model, &s->scratch);
    scratch_free(s->model, &s->shared);
    s->model->ops->release(s->model->ops, s->memory, s->bytes);
    budget_give(s->model, s->counted);
    free(s->k);
    free(s->v);
    free(s);
}

int session_scratch(dg_session *s, int64_t n, scratch **out, dg_error *error) {
    *out = n <= s->rows ? &s->scratch : &s->shared;
    if (n <= s->rows || n <= s->shared_rows) return DG_OK;
    const int64_t had = s->shared_rows ? scratch_pass_bytes(s->model, s->shared_rows) : 0,
                  bytes = scratch_pass_bytes(s->model, n);
    char what[64];
    snprintf(what, sizeof what, "a pass over %lld tokens at once", (long long)n);
    int status = budget_take(s->model, bytes - had, what, "", error);
    if (status != DG_OK) return status;
    s->counted += bytes - had;
    scratch_free(s->model, &s->shared);
    s->shared_rows = 0;
    status = scratch_new(s->model, n, &s->shared, error);
    if (status == DG_OK) s->shared_rows = n;
    return status;
}

void dg_session_stop(dg_session *s, bool stop) { atomic_store(&s->stop, stop); }

void dg_session_ask(dg_session *s, dg_stop ask, void *user) {
    s->ask = ask;
    s->ask_user = user;
    s->asked = os_nanoseconds();
}

bool session_stops(dg_session *s) {
    if (atomic_load_explicit(&s->stop, memory_order_relaxed)) return true;
    if (!s->ask) return false;
    const uint64_t now = os_nanoseconds();
    if (now - s->asked < ASK_EVERY) return false;
    s->asked = now;
    return s->ask(s->ask_user);
}

int32_t dg_session_length(const dg_session *s) { return s->length; }
int32_t dg_session_context(const dg_session *s) { return s->context; }

int dg_session_rewind(dg_session *s, int32_t length, dg_error *error) {
    if (length < 0 || length > s->length)
        return fail(error, DG_ERROR_USAGE, "rewind: expected 0 to %d (the tokens encoded), got %d", s->length, length);
    s->length = length;
    return DG_OK;
}

int dg_model_demand(dg_model *model, int32_t context, bool device, dg_demand *d, dg_error *error) {
    const int status = check_context(model, &context, error);
    if (status != DG_OK) return status;
    demand_session(model, context, !device, d);
    return DG_OK;
}
