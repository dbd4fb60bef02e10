/* Picks the backend: the only place that knows which there are. */
#include "ops.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/gemm.h"
#include "error.h"
#ifdef DG_CUDA
#include "../cuda/backend.h"
#else
static bool cuda_usable(void) { return false; }
static int cuda_open(ops *o, bool exact, dg_error *error) {
    (void)o, (void)exact;
    return fail(error, DG_ERROR_BACKEND,
                "cuda: this build has no CUDA backend; 'make CUDA=1', with NVIDIA's compiler, makes one that has");
}
static void cuda_close(ops *o) { (void)o; }
static int cuda_status(const ops *o, dg_error *error) { return (void)o, (void)error, DG_OK; }
static bool cuda_overlap_watch(const ops *o, bool watch) { return (void)o, (void)watch, false; }
static bool cuda_overlap_read(const ops *o, dg_overlap *out) { return (void)o, (void)out, false; }
static bool cuda_measure(const ops *o, dg_device_rates *out) { return (void)o, (void)out, false; }
static void cuda_rated(const ops *o, dg_machine *machine) { (void)o, (void)machine; }
#endif
static const char CUDA[] = "cuda";

enum { PANEL_ROWS = 16, LEAST_SCRATCH = 1 << 16 };

static const char FAST[] = "cpu", PLAIN[] = "reference"; /* between them, one per instruction set; behind them, CUDA */

const char *dg_backend_name(int32_t i) {
    if (i <= 0) return i == 0 ? FAST : NULL;
    const isa *set = isa_usable(i - 1);
    if (set) return set->backend;
    if (i == 1 || isa_usable(i - 2)) return PLAIN;
    return (i == 2 || isa_usable(i - 3)) && cuda_usable() ? CUDA : NULL;
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Backend i of dg_backend_name. */
static void fill(ops *o, int32_t i, bool exact) {
    const isa *set = isa_usable(i > 0 ? i - 1 : 0); /* none for the reference */
#define DG_OP(op, arguments, names) o->op = reference_##op;
#define DG_HOST_OP(op, arguments, names) o->op = host_##op;
#include "ops.def"
#undef DG_OP
    o->key_bytes = sizeof(float);
    o->lazy = true;
    if (set) set->simd(o);
    if (set && set->gemm && !exact) set->gemm(o);
    if (set && i == 0) snprintf(o->name, sizeof o->name, "%s (%s)", FAST, set->backend + strlen("cpu-"));
    else snprintf(o->name, sizeof o->name, "%s", dg_backend_name(i));
}

/* The CPU's table beside a device's. */
static bool open_beside(ops *o, bool exact) {
    ops *b = calloc(1, sizeof *b);
    o->beside = b;
    if (!b) return false;
    atomic_init(&b->longest, 0.0);
    b->pool = o->pool;
    b->scratch = o->scratch;
    b->scratch_floats = o->scratch_floats;
    b->tolerance = o->tolerance;
    fill(b, 0, exact);
    return true;
}

static int unknown(const char *backend, dg_error *error) {
    char known[200] = "auto";
    for (int32_t i = 0; dg_backend_name(i); i++) {
        const size_t length = strlen(known);
        snprintf(known + length, sizeof known - length, "%s%s", dg_backend_name(i + 1) ? ", " : " and ",
                 dg_backend_name(i));
    }
    return fail(error, DG_ERROR_BACKEND,
                "backend '%.40s' is not part of this build, or not for this processor; there are %s", backend, known);
}

int ops_new(const dg_model_options *options, const dg_config *c, ops **out, dg_error *error) {
    *out = NULL;
    const char *backend =
        options->backend && strcmp(options->backend, "auto") != 0 ? options->backend : dg_backend_name(0);
    int32_t threads = options->threads, chosen = 0;
    while (dg_backend_name(chosen) && strcmp(backend, dg_backend_name(chosen)) != 0) chosen++;
    const bool cuda = strcmp(backend, CUDA) == 0; /* which says itself why it cannot */
    if (!dg_backend_name(chosen) && !cuda) return unknown(backend, error);
    if (threads < 0 || threads > 1024)
        return fail(error, DG_ERROR_USAGE, "threads: expected 1 to 1024, or 0 for all processors, got %d", threads);
    if (threads == 0) threads = os_processors();

    ops *o = calloc(1, sizeof *o);
    if (!o) return fail(error, DG_ERROR_SYSTEM, "no memory");
    atomic_init(&o->longest, 0.0);
    int64_t cols = largest(largest(c->d_model, c->d_ffn), c->d_expert);
    for (int32_t l = 0; l < c->n_layer; l++) cols = largest(cols, config_d_q(c, l));
    o->scratch_floats = largest(LEAST_SCRATCH, PANEL_ROWS * ((cols + 15) / 16 * 16));
    o->scratch_floats = largest(o->scratch_floats, GEMM_SCRATCH_FLOATS);
    o->scratch_floats =
        largest(o->scratch_floats, largest(attention_scratch(c->head_dim), attention_scratch(c->head_dim_swa)));
    o->scratch_floats = (o->scratch_floats + 15) / 16 * 16;
    o->scratch = os_reserve((size_t)(o->scratch_floats * threads) * sizeof(float));
    o->pool = pool_new(threads);
    o->tolerance = options->tolerance != 0.0f ? options->tolerance : 1e-3f;
    const int opened = cuda ? cuda_open(o, options->exact, error) : (fill(o, chosen, options->exact), DG_OK);
    if (opened != DG_OK) {
        ops_free(o);
        return opened;
    }
    if (!o->scratch || !o->pool) {
        /* the pool would tell how much it is */
        os_release(o->scratch, (size_t)(o->scratch_floats * threads) * sizeof(float));
        o->scratch = NULL;
        ops_free(o);
        return fail(error, DG_ERROR_SYSTEM, "cannot start %d threads", threads);
    }
    if (cuda && !open_beside(o, options->exact)) {
        ops_free(o);
        return fail(error, DG_ERROR_SYSTEM, "no memory");
    }
    *out = o;
    return DG_OK;
}

int ops_status(const ops *o, dg_error *error) { return o->device ? cuda_status(o, error) : DG_OK; }

bool ops_overlap_watch(const ops *o, bool watch) { return o->device && cuda_overlap_watch(o, watch); }
bool ops_overlap_read(const ops *o, dg_overlap *out) { return o->device && cuda_overlap_read(o, out); }
bool ops_device_measure(const ops *o, dg_device_rates *out) { return o->device && cuda_measure(o, out); }
void ops_device_rated(const ops *o, dg_machine *machine) {
    if (o->device) cuda_rated(o, machine);
}

int ops_repack(ops *o, layer *layers, int32_t n_layer, int64_t budget, dg_error *error) {
    if (o->device) return fail(error, DG_ERROR_USAGE, "repack: %s reads experts as the file has them", o->name);
    return gemm_repack(o, layers, n_layer, budget, &o->repacked, &o->repacked_bytes, error);
}

int64_t ops_scratch_bytes(const ops *o) { return o->scratch_floats * pool_threads(o->pool) * (int64_t)sizeof(float); }

void ops_free(ops *o) {
    if (!o) return;
    if (o->device) cuda_close(o);
    free((void *)(uintptr_t)o->beside);
    os_release(o->repacked, o->repacked_bytes);
    if (o->scratch && o->pool)
        os_release(o->scratch, (size_t)(o->scratch_floats * pool_threads(o->pool)) * sizeof(float));
    pool_free(o->pool);
    free(o);
}
