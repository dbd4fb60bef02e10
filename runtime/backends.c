/* The backends: one row each, and the only place that knows which there are. */
#include "ops.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/gemm.h"
#include "error.h"
#ifdef DG_CUDA
#include "../cuda/backend.h"
#endif

enum { PANEL_ROWS = 16, LEAST_SCRATCH = 1 << 16 };

/* ---- The CPU ---- */

/* set NULL: the reference. */
static void fill(ops *o, const isa *set, bool exact) {
#define DG_OP(op, arguments, names) o->op = reference_##op;
#define DG_HOST_OP(op, arguments, names) o->op = host_##op;
#include "ops.def"
#undef DG_OP
    o->key_bytes = sizeof(float);
    if (!set) return;
    set->simd(o);
    if (set->gemm && !exact) set->gemm(o);
}

/* With the best instruction set that there is. */
static int open_cpu(ops *o, bool exact, dg_error *error) {
    const isa *set = isas;
    (void)error;
    while (set->name && !set->usable()) set++;
    fill(o, set->name ? set : NULL, exact);
    if (set->name) snprintf(o->name, sizeof o->name, "%s (%s)", o->backend->name, set->name);
    return DG_OK;
}

static int open_reference(ops *o, bool exact, dg_error *error) {
    (void)error;
    fill(o, NULL, exact);
    return DG_OK;
}

#define DG_ISA(id, float_code, products, flags, condition)         \
    static bool has_##id(void) { return isas[ISA_##id].usable(); } \
    static int open_##id(ops *o, bool exact, dg_error *error) {    \
        (void)error;                                               \
        fill(o, &isas[ISA_##id], exact);                           \
        return DG_OK;                                              \
    }
#include "cpu/isa.def"
#undef DG_ISA

/* ---- CUDA, in a build without ---- */

#ifndef DG_CUDA
static bool cuda_usable(void) { return false; }
static int cuda_open(ops *o, bool exact, dg_error *error) {
    (void)o, (void)exact;
    return fail(error, DG_ERROR_BACKEND,
                "cuda: this build has no CUDA backend; 'make CUDA=1', with NVIDIA's compiler, makes one that has");
}
#endif

/* ---- The rows, best first ---- */

static const ops_backend rows[] = {
    {.name = "cpu", .open = open_cpu, .repack = gemm_repack, .lazy = true},
#define DG_ISA(id, float_code, products, flags, condition) \
    {.name = "cpu-" #id, .usable = has_##id, .open = open_##id, .repack = gemm_repack, .lazy = true},
#include "cpu/isa.def"
#undef DG_ISA
    {.name = "reference", .open = open_reference, .repack = gemm_repack, .lazy = true},
    {
        .name = "cuda",
        .usable = cuda_usable,
        .explains = true,
        .own_memory = true,
        .asynchronous = true,
        .open = cuda_open,
#ifdef DG_CUDA
        .close = cuda_close,
        .status = cuda_status,
        .overlap_watch = cuda_overlap_watch,
        .overlap_read = cuda_overlap_read,
        .measure = cuda_measure,
        .rated = cuda_rated,
#endif
    },
};
enum { ROWS = sizeof rows / sizeof *rows };
static const ops_backend *const cpu = rows;

static bool usable(const ops_backend *b) { return !b->usable || b->usable(); }

/* The i-th that is usable; NULL past the end. */
static const ops_backend *usable_at(int32_t i) {
    for (const ops_backend *b = rows; i >= 0 && b < rows + ROWS; b++)
        if (usable(b) && i-- == 0) return b;
    return NULL;
}

const char *dg_backend_name(int32_t i) {
    const ops_backend *b = usable_at(i);
    return b ? b->name : NULL;
}

bool dg_backend_has_vram(int32_t i) {
    const ops_backend *b = usable_at(i);
    return b && b->own_memory;
}

const char *ops_with_vram(int32_t i) {
    for (const ops_backend *b = rows; i >= 0 && b < rows + ROWS; b++)
        if (b->own_memory && i-- == 0) return b->name;
    return NULL;
}

/* ---- Tables ---- */

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* The CPU's table beside one that works in memory of its own. */
static bool open_beside(ops *o, bool exact) {
    ops *b = calloc(1, sizeof *b);
    o->beside = b;
    if (!b) return false;
    atomic_init(&b->longest, 0.0);
    b->pool = o->pool;
    b->scratch = o->scratch;
    b->scratch_floats = o->scratch_floats;
    b->tolerance = o->tolerance;
    b->backend = cpu;
    return cpu->open(b, exact, NULL) == DG_OK;
}

/* The row that options ask for, or NULL. */
static const ops_backend *choose(const char *name) {
    if (!name || strcmp(name, "auto") == 0) return usable_at(0);
    for (const ops_backend *b = rows; b < rows + ROWS; b++)
        if (strcmp(name, b->name) == 0) return usable(b) || b->explains ? b : NULL;
    return NULL;
}

static int unknown(const char *name, dg_error *error) {
    char known[200] = "auto";
    for (int32_t i = 0; dg_backend_name(i); i++) {
        const size_t length = strlen(known);
        snprintf(known + length, sizeof known - length, "%s%s", dg_backend_name(i + 1) ? ", " : " and ",
                 dg_backend_name(i));
    }
    return fail(error, DG_ERROR_BACKEND,
                "backend '%.40s' is not part of this build, or not for this processor; there are %s", name, known);
}

int ops_new(const dg_model_options *options, const dg_config *c, ops **out, dg_error *error) {
    *out = NULL;
    int32_t threads = options->threads;
    const ops_backend *chosen = choose(options->backend);
    if (!chosen) return unknown(options->backend, error);
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
    o->backend = chosen;
    snprintf(o->name, sizeof o->name, "%s", chosen->name);
    const int opened = chosen->open(o, options->exact, error);
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
    if (chosen->own_memory && !open_beside(o, options->exact)) {
        ops_free(o);
        return fail(error, DG_ERROR_SYSTEM, "no memory");
    }
    *out = o;
    return DG_OK;
}

int ops_status(const ops *o, dg_error *error) { return o->backend->status ? o->backend->status(o, error) : DG_OK; }

bool ops_overlap_watch(const ops *o, bool watch) {
    return o->backend->overlap_watch && o->backend->overlap_watch(o, watch);
}

bool ops_overlap_read(const ops *o, dg_overlap *out) {
    return o->backend->overlap_read && o->backend->overlap_read(o, out);
}

bool ops_device_measure(const ops *o, dg_device_rates *out) {
    return o->backend->measure && o->backend->measure(o, out);
}

void ops_device_rated(const ops *o, dg_machine *machine) {
    if (o->backend->rated) o->backend->rated(o, machine);
}

int ops_repack(ops *o, layer *layers, int32_t n_layer, int64_t budget, dg_error *error) {
    if (!o->backend->repack)
        return fail(error, DG_ERROR_USAGE, "repack: %s reads experts as the file has them", o->name);
    return o->backend->repack(o, layers, n_layer, budget, &o->repacked, &o->repacked_bytes, error);
}

int64_t ops_scratch_bytes(const ops *o) { return o->scratch_floats * pool_threads(o->pool) * (int64_t)sizeof(float); }

void ops_free(ops *o) {
    if (!o) return;
    if (o->backend->close) o->backend->close(o);
    free((void *)(uintptr_t)o->beside);
    os_release(o->repacked, o->repacked_bytes);
    if (o->scratch && o->pool)
        os_release(o->scratch, (size_t)(o->scratch_floats * pool_threads(o->pool)) * sizeof(float));
    pool_free(o->pool);
    free(o);
}
