/* Experts copied into the form that their kernels unpack fastest: see gemm_kernel. */
#include <stdlib.h>

#include "error.h"
#include "gemm.h"

enum {
    MATRICES = 3,       /* of an expert: gate, up, down */
    LARGEST_PAGE = 1 << 16,
};

typedef struct repacking {
    const ops *o;
    tensor *w[MATRICES];
    uint8_t *to[MATRICES];
} repacking;

static int64_t matrix_bytes(const tensor *w) { return gemm_padded(w->rows) * w->row_bytes; }

/* Bytes of one repacked expert; 0 where the layer's experts are not multiplied by kernels that have such a form. */
static int64_t expert_bytes(const ops *o, const layer *l) {
    const tensor *w[MATRICES] = {&l->ffn_gate_exps, &l->ffn_up_exps, &l->ffn_down_exps};
    int64_t bytes = 0;
    for (int i = 0; i < MATRICES; i++) {
        const gemm_kernel *k = o->gemm ? gemm_kernel_for(o->gemm, w[i]) : NULL;
        if (!k || !k->repack) return 0;
        bytes += matrix_bytes(w[i]);
    }
    return bytes;
}

/* Frees the pages of the mapped file that have only this matrix; they can be read from the file again. */
static void let_go(const tensor *w, int64_t expert) {
    const uintptr_t begin = (uintptr_t)tensor_row(w, expert, 0), end = (uintptr_t)tensor_row(w, expert, w->rows);
    const uintptr_t first = (begin + LARGEST_PAGE - 1) / LARGEST_PAGE * LARGEST_PAGE,
                    last = end / LARGEST_PAGE * LARGEST_PAGE;
    if (first < last) os_discard((void *)first, last - first);
}

static void repack_item(void *arg, int64_t item, int32_t thread) {
    const repacking *a = arg;
    const tensor *w = a->w[item % MATRICES];
    const gemm_kernel *k = gemm_kernel_for(a->o->gemm, w);
    const int64_t expert = item / MATRICES;
    (void)thread;
    uint8_t *to = a->to[item % MATRICES] + expert * matrix_bytes(w);
    for (int64_t row = 0; row < gemm_padded(w->rows); row += GEMM_REPACKED) {
        const uint8_t *rows[GEMM_REPACKED];
        for (int64_t r = 0; r < GEMM_REPACKED; r++)
            rows[r] = tensor_row(w, expert, row + r < w->rows ? row + r : w->rows - 1);
        k->repack(to + row * w->row_bytes, rows, w->cols / w->format->block);
    }
    let_go(w, expert);
}

int gemm_repack(const ops *o, layer *layers, int32_t n_layer, int64_t budget, uint8_t **memory, size_t *bytes,
                dg_error *error) {
    if (budget < 0)
        return fail(error, DG_ERROR_USAGE, "repack: expected a number of bytes, got %lld", (long long)budget);
    int64_t least = 0, total = 0, *count = calloc((size_t)n_layer, sizeof *count); /* of each layer's experts */
    if (!count) return fail(error, DG_ERROR_SYSTEM, "no memory");
    for (int32_t l = 0; l < n_layer; l++) {
        const int64_t each = expert_bytes(o, &layers[l]), n = layers[l].ffn_gate_exps.experts;
        if (!each) continue;
        if (!least) least = each;
        count[l] = (budget - total) / each < n ? (budget - total) / each : n;
        total += count[l] * each;
        if (count[l] < n) break;
    }
    const int64_t left = dg_memory_free();
    int status = DG_OK;
    if (!least)
        status = fail(error, DG_ERROR_BACKEND, "repack is not available on %s %s", o->name,
                      o->gemm ? "for this model's experts" : "in float32");
    else if (!total)
        status = fail(error, DG_ERROR_MEMORY, "repack: expected at least the %lld bytes of one expert, got %lld",
                      (long long)least, (long long)budget);
    else if (total > left && left > 0)
        status = fail(error, DG_ERROR_MEMORY, "repack: the copies take %lld bytes, and %lld bytes of memory are free",
                      (long long)total, (long long)left);
    else if (!(*memory = os_reserve((size_t)total)))
        status = fail(error, DG_ERROR_SYSTEM, "repack: no memory for %lld bytes", (long long)total);
    else *bytes = (size_t)total;
    uint8_t *at = *memory;
    if (status == DG_OK) os_large_pages(at, *bytes); /* worth another 5 to 10 % */
    for (int32_t l = 0; l < n_layer && status == DG_OK; l++) {
        repacking a = {.o = o, .w = {&layers[l].ffn_gate_exps, &layers[l].ffn_up_exps, &layers[l].ffn_down_exps}};
        for (int i = 0; i < MATRICES && count[l]; i++) {
            a.to[i] = at;
            at += count[l] * matrix_bytes(a.w[i]);
        }
        pool_run(o->pool, repack_item, &a, count[l] * MATRICES);
        for (int i = 0; i < MATRICES; i++) {
            a.w[i]->repacked = a.to[i];
            a.w[i]->n_repacked = count[l];
        }
    }
    free(count);
    return status;
}
