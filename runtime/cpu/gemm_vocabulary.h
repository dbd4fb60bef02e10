/* What the integer ops need beside products, LANES at a time: the activation function, and rows of the vocabulary. */
#ifndef DG_GEMM_VOCABULARY_H
#define DG_GEMM_VOCABULARY_H

#include <math.h>

#include "decoders.h"
#include "simd_math.h"

static void gelu_mul(float *y, const float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vf_store(y + i, vf_mul(vf_gelu(vf_load(gate + i)), vf_load(up + i)));
}

/* NaN where there is NaN or infinity. */
static float peak_of(const float *z, int64_t n) { return largest_of(z, n) + nothing_of(z, n); }

static void squash(float *z, int64_t n, float cap, float slope) {
    const vf inverse = vf_set(1.0f / cap), scale = vf_set(cap * slope);
    for (int64_t i = 0; i < n; i += LANES)
        vf_store_first(z + i, vf_mul(scale, vf_tanh(vf_mul(vf_load_first(z + i, n - i), inverse))), n - i);
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

static void decode_blocks(const dg_format *f, const void *blocks, float *values, int64_t n_blocks) {
    switch (f->id) {
#define DG_FORMAT(NAME, id, stem, block, encodes) \
    case id: stem##_decode_blocks(blocks, values, n_blocks); break;
#include "formats.def"
#undef DG_FORMAT
    }
}

static void decode_row(const tensor *table, int64_t row, float *values) {
    decode_blocks(table->format, tensor_row(table, 0, row), values, table->cols / table->format->block);
}

static void blend_row(const tensor *table, int64_t row, float share, float *y) {
    enum { STRETCH = 256 }; /* columns: a whole number of any format's blocks, and of vectors */
    const dg_format *f = table->format;
    const uint8_t *blocks = tensor_row(table, 0, row);
    float values[STRETCH];
    for (int64_t c = 0; c < table->cols; c += STRETCH) {
        const int64_t n = table->cols - c < STRETCH ? table->cols - c : STRETCH;
        decode_blocks(f, blocks + c / f->block * f->bytes, values, n / f->block);
        for (int64_t i = 0; i < n; i += LANES)
            vf_store(y + c + i, vf_add(vf_load(y + c + i), vf_mul(vf_set(share), vf_load(values + i))));
    }
}

#endif
