/* Values so small that the rounding of a half-precision scale may be large. */
#ifndef DG_TINY_H
#define DG_TINY_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#define TINY 0x1p-10f /* smaller ones may decode further from what they are than zeros */

static inline float largest(const float *values, int64_t n) {
    float most = 0.0f;
    for (int64_t i = 0; i < n; i++) most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
    return most;
}

static inline bool far_too_large(const float *decoded, int64_t n, float most) {
    return largest(decoded, n) > 2.0f * most;
}

#endif
