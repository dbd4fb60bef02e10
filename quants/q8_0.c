#include "encode.h"
#include "q8_0.h"
#include "uniform.h"

/* To nearest, ties away from zero, as roundf, but it vectorises; |v| < 2^31. */
static inline int32_t round_away(float v) {
    const int32_t whole = (int32_t)v;
    const float rest = v - (float)whole;
    return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

void q8_0_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    (void)importance;
    block_q8_0 *b = blocks;
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        const float d = peak32(values) / 127.0f;
        const float inverse = inverse_or_zero(d);
        b[k].d = half_from_float(d);
        for (int i = 0; i < 32; i++) b[k].q[i] = (int8_t)round_away(clamp(values[i] * inverse, -127.0f, 127.0f));
    }
}
