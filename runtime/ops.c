/* Picks the backend: the only place that knows which there are. */
#include "ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "error.h"

enum { PANEL_ROWS = 16, LEAST_SCRATCH = 1 << 16 };

static const struct {
    const char *name;
    bool fast; /* takes the best instruction set the processor has */
} backends[] = {{"cpu", true}, {"reference", false}};
enum { BACKENDS = sizeof backends / sizeof *backends };

const char *dg_backend_name(int32_t i) { return i >= 0 && i < BACKENDS ? backends[i].name : NULL; }

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static void fill(ops *o, int backend, char name[64]) {
#define DG_OP(op, arguments) o->op = reference_##op;
#include "ops.def"
#undef DG_OP
    const char *set = backends[backend].fast ? cpu_avx2_install(o) : NULL;
    snprintf(name, 64, set ? "%s (%s)" : "%s", backends[backend].name, set);
}

int ops_new(const dg_model_options *options, const dg_config *c, ops **out, dg_error *error) {
    *out = NULL;
    const char *backend = options->backend ? options->backend : "auto";
    int32_t threads = options->threads;
    int chosen = 0;
    if (strcmp(backend, "auto") != 0)
        while (chosen < BACKENDS && strcmp(backend, backends[chosen].name) != 0) chosen++;
    if (chosen == BACKENDS)
        return fail(error, DG_ERROR_BACKEND, "backend '%.40s' is not part of this build; it has auto, cpu and reference", backend);
    if (threads < 0 || threads > 1024) return fail(error, DG_ERROR_USAGE, "threads: expected 1 to 1024, or 0 for all processors, got %d", threads);
    if (threads == 0) threads = os_processors();

    ops *o = calloc(1, sizeof *o);
    if (!o) return fail(error, DG_ERROR_SYSTEM, "no memory");
    int64_t cols = largest(largest(c->d_model, c->d_ffn), c->d_expert);
    for (int32_t l = 0; l < c->n_layer; l++) cols = largest(cols, config_d_q(c, l));
    o->scratch_floats = largest(LEAST_SCRATCH, PANEL_ROWS * ((cols + 15) / 16 * 16));
    o->scratch = os_reserve((size_t)(o->scratch_floats * threads) * sizeof(float));
    o->pool = pool_new(threads);
    fill(o, chosen, o->name);
    if (!o->scratch || !o->pool) {
        ops_free(o);
        return fail(error, DG_ERROR_SYSTEM, "cannot start %d threads", threads);
    }
    *out = o;
    return DG_OK;
}

void ops_free(ops *o) {
    if (!o) return;
    if (o->scratch && o->pool) os_release(o->scratch, (size_t)(o->scratch_floats * pool_threads(o->pool)) * sizeof(float));
    pool_free(o->pool);
    free(o);
}
