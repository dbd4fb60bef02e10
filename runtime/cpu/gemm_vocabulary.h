/* What the integer ops need beside products, LANES at a time: the activation function, and rows of the vocabulary. */
#ifndef DG_GEMM_VOCABULARY_H
#define DG_GEMM_VOCABULARY_H

#include <math.h>

#include "simd_math.h"

static void gelu_mul(float *y, const float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vf_store(y + i, vf_mul(vf_gelu(vf_load(gate + i)), vf_load(up + i)));
}

static void squash(float *z, int64_t n, float cap, float slope) {
    const vf inverse = vf_set(1.0f / cap), scale = vf_set(cap * slope);
    for (int64_t i = 0; i < n; i += LANES) vf_store_first(z + i, vf_mul(scale, vf_tanh(vf_mul(vf_load_first(z + i, n - i), inverse))), n - i);
}

static void sums_of(const float *z, int64_t n, float peak, float *total, float *moment) {
    vf sum = vf_set(0.0f), product = vf_set(0.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        const vf d = vf_sub(vf_load_first(z + i, n - i), vf_set(peak));
        const vf e = vf_select(vf_first(n - i), vf_exp(d), vf_set(0.0f));
        sum = vf_add(sum, e);
        product = vf_fma(e, d, product);
    }
    *total = vf_sum(sum);
    *moment = vf_sum(product);
}

#endif
