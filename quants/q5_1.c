#include "encode.h"
#include "q5_1.h"
#include "search.h"

/* A float's bits as an integer that compares as the float does, and back. */
static inline int32_t order_key(float v) {
    const int32_t bits = (int32_t)float_to_bits(v);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float order_value(int32_t key) { return bits_to_float((uint32_t)(key ^ (key >> 31 & 0x7fffffff))); }

static void q5_1_block(const float *values, float d, float m, block_q5_1 *b) {
    uint8_t codes[32];
    uniform_codes(values, 32, m, inverse_or_zero(d), 0.5f, 31.0f, codes);
    b->d = half_from_float(d);
    b->m = half_from_float(m);
    pack_fifth_bits(codes, b->high);
    pack_halves(codes, b->q);
}

static void q5_1_weighted(const float *values, const float *importance, int64_t n_blocks, block_q5_1 *b) {
    float four[LANES * 32] = {0};
    lanes x[32], w[32];
    memcpy(four, values, (size_t)n_blocks * 32 * sizeof *four);
    lanes_load(four, 32, x);
    memcpy(four, importance, (size_t)n_blocks * 32 * sizeof *four);
    lanes_load(four, 32, w);
    const affine_fit fit = search_affine_lanes(x, w, 31.0f);
    for (int64_t j = 0; j < n_blocks; j++)
        q5_1_block(values + 32 * j, half_to_float(scale_for(fit.scale[j], 1.0f)),
                   -half_to_float(scale_for(fit.min[j], 1.0f)), b + j);
}

/* From the least to the greatest value; where errors have weights, the line that they ask for. */
void q5_1_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    block_q5_1 *b = blocks;
    for (int64_t k = 0; k < n_blocks && importance; k += LANES)
        q5_1_weighted(values + 32 * k, importance + 32 * k, n_blocks - k < LANES ? n_blocks - k : LANES, b + k);
    for (int64_t k = 0; k < n_blocks && !importance; k++) {
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (int i = 0; i < 32; i++) {
            const int32_t key = order_key(values[32 * k + i]);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
        const float m = order_value(low), d = (order_value(high) - m) / 31.0f;
        q5_1_block(values + 32 * k, d, m, b + k);
    }
}
