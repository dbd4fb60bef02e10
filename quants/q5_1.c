#include "encode.h"
#include "q5_1.h"
#include "uniform.h"

/* A float's bits as an integer that compares as the float does, and back. */
static inline int32_t order_key(float v) {
    const int32_t bits = (int32_t)float_to_bits(v);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float order_value(int32_t key) { return bits_to_float((uint32_t)(key ^ (key >> 31 & 0x7fffffff))); }

void q5_1_encode(const float *values, void *blocks, int64_t n_blocks) {
    block_q5_1 *b = blocks;
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (int i = 0; i < 32; i++) {
            const int32_t key = order_key(values[i]);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
        const float m = order_value(low), d = (order_value(high) - m) / 31.0f;
        uint8_t codes[32];
        uniform_codes(values, 32, m, inverse_or_zero(d), 0.5f, 31.0f, codes);
        b[k].d = half_from_float(d);
        b[k].m = half_from_float(m);
        pack_fifth_bits(codes, b[k].high);
        pack_halves(codes, b[k].q);
    }
}
