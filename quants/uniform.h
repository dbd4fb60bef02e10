/* Arithmetic that encoders share: ranges, inverses, evenly spaced codes and how codes are packed. */
#ifndef DG_UNIFORM_H
#define DG_UNIFORM_H
#include "blocks.h"

/* Into [low, high] without a branch; NaN becomes high, so that a conversion to an integer is always in range. */
static inline float clamp(float v, float low, float high) {
    v = v < high ? v : high;
    return v > low ? v : low;
}

/* 1 / d, or 0 where that is not finite: the scale is then 0, or infinite, in half precision anyway. */
static inline float inverse_or_zero(float d) {
    const float inverse = 1.0f / d;
    return inverse >= -3.402823466e38f && inverse <= 3.402823466e38f ? inverse : 0.0f;
}

/* The largest magnitude of 32 values. Magnitudes compare like their bits, and integers vectorise. */
static inline float peak32(const float *values) {
    int32_t peak = 0;
    for (int i = 0; i < 32; i++) {
        const int32_t bits = (int32_t)(float_to_bits(values[i]) & 0x7fffffffu);
        peak = bits > peak ? bits : peak;
    }
    return bits_to_float((uint32_t)peak);
}

/* The value of largest magnitude among 32, with its sign; the first of equals. */
static inline float extreme32(const float *values) {
    const uint32_t peak = float_to_bits(peak32(values));
    int i = 0;
    while ((float_to_bits(values[i]) & 0x7fffffffu) != peak) i++;
    return values[i];
}

/* codes = (values - base) * inverse + offset, cut off to an integer, 0 to top. */
static inline void uniform_codes(const float *values, int n, float base, float inverse, float offset, float top,
                                 uint8_t *codes) {
    for (int i = 0; i < n; i++) codes[i] = (uint8_t)(int32_t)clamp((values[i] - base) * inverse + offset, 0.0f, top);
}

/* Two codes a byte, as Q4_0, Q5_0, Q5_1 and IQ4_NL have them. */
static inline void pack_halves(const uint8_t *codes, uint8_t *q) {
    for (int i = 0; i < 16; i++) q[i] = (uint8_t)((codes[i] & 15) | codes[i + 16] << 4);
}

/* The fifth bits of 32 codes, as Q5_0 and Q5_1 have them. */
static inline void pack_fifth_bits(const uint8_t *codes, uint8_t *high) {
    for (int k = 0; k < 4; k++) {
        int bits = 0;
        for (int i = 0; i < 8; i++) bits |= (codes[8 * k + i] >> 4 & 1) << i;
        high[k] = (uint8_t)bits;
    }
}

#endif
