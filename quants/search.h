/* The search for scales. It processes four sub-blocks at once, one in each lane of a vector, so that no code branches
 * on a value. The vector type is an extension of gcc and clang: four floats on every processor. */
#ifndef DG_SEARCH_H
#define DG_SEARCH_H
#include <stddef.h>

#include "uniform.h"

typedef float lanes __attribute__((vector_size(16)));
typedef int32_t lane_mask __attribute__((vector_size(16))); /* of a comparison: -1 or 0 per lane */
enum { LANES = 4, SCALE_TRIES = 8 };

static inline lanes choose(lane_mask where, lanes yes, lanes no) {
    return (lanes)((where & (lane_mask)yes) | (~where & (lane_mask)no));
}

static inline lanes all_lanes(float v) { return (lanes){v, v, v, v}; }

/* NaN becomes high. */
static inline lanes clamp_lanes(lanes v, float low, float high) {
    v = choose(v < all_lanes(high), v, all_lanes(high));
    return choose(v > all_lanes(low), v, all_lanes(low));
}

/* To the nearest integer, ties to even; |v| < 2^22. */
static inline lanes round_lanes(lanes v) { return (v + 12582912.0f) - 12582912.0f; }

/* a / b, or a where b is 0. */
static inline lanes ratio(lanes a, lanes b) { return a / choose(b == all_lanes(0.0f), all_lanes(1.0f), b); }

/* values[LANES][n] -> x[n]; NaN becomes 0, and what no format can hold is cut off, so that every sum stays finite: of
 * 1e9 every scale is still infinite in half precision. */
static inline void lanes_load(const float *values, int n, lanes *x) {
    for (int i = 0; i < n; i++) {
        const lanes v = {values[i], values[n + i], values[2 * n + i], values[3 * n + i]};
        x[i] = clamp_lanes(choose(v == v, v, all_lanes(0.0f)), -1e9f, 1e9f);
    }
}

/* The half-precision scale largest / steps; infinite where it is too large for half precision. */
static inline uint16_t scale_for(float largest, float steps) { return half_from_float(largest / steps); }

/* Does the same for values that may be NULL: returns x, or NULL. */
static inline const lanes *lanes_load_weights(const float *importance, int n, lanes *x) {
    if (!importance) return NULL;
    lanes_load(importance, n, x);
    return x;
}

/* The scale per lane with which codes, as `nearest` finds them, reproduce n values best: the least-squares fit to the
 * codes of the best of several tries. A try of t puts the value of largest magnitude at -t; t may be negative.
 * weights: NULL, or of the squared errors. */
static inline lanes search_scale(const lanes *x, const lanes *weights, int n, lanes (*nearest)(lanes),
                                 const float *tries, int n_tries) {
    lanes low = all_lanes(0.0f), high = low, scale = low, best = low;
    for (int i = 0; i < n; i++) {
        low = choose(x[i] < low, x[i], low);
        high = choose(x[i] > high, x[i], high);
    }
    const lanes unit = ratio(all_lanes(-1.0f), choose(high > -low, high, low));
    for (int t = 0; t <= n_tries; t++) {
        /* the last try starts from the best fit so far */
        const lanes inverse = t < n_tries ? unit * tries[t] : ratio(all_lanes(1.0f), scale);
        lanes qx = all_lanes(0.0f), qq = qx;
        for (int i = 0; i < n; i++) {
            const lanes q = nearest(x[i] * inverse), wq = weights ? weights[i] * q : q;
            qx += wq * x[i];
            qq += wq * q;
        }
        const lanes fit = ratio(qx, qq), explained = fit * qx;
        const lane_mask better = explained > best;
        best = choose(better, explained, best);
        scale = choose(better, fit, scale);
    }
    return scale;
}

/* The same for up to four blocks of 32 values: values[n_blocks * 32] -> a scale per lane. */
static inline lanes search_blocks(const float *values, const float *importance, int64_t n_blocks,
                                  lanes (*nearest)(lanes), const float *tries, int n_tries) {
    float four[LANES * 32] = {0};
    lanes x[32], w[32];
    memcpy(four, values, (size_t)n_blocks * 32 * sizeof *four);
    lanes_load(four, 32, x);
    if (!importance) return search_scale(x, NULL, 32, nearest, tries, n_tries);
    memcpy(four, importance, (size_t)n_blocks * 32 * sizeof *four);
    lanes_load(four, 32, w);
    return search_scale(x, w, 32, nearest, tries, n_tries);
}

/* The scales of up to four blocks of 32 values for codes from -steps to steps - 1: the value of largest magnitude at
 * -steps or, where errors have weights, the best of tries around that and around steps - 1. */
static inline void block_scales(const float *values, const float *importance, int64_t n_blocks, float steps,
                                lanes (*nearest)(lanes), float *scales) {
    float tries[2 * SCALE_TRIES];
    for (int t = 0; importance && t < SCALE_TRIES; t++) {
        const float part = 0.84f + 0.04f * (float)t;
        tries[2 * t] = part * steps;
        tries[2 * t + 1] = -part * (steps - 1.0f);
    }
    const lanes best =
        importance ? search_blocks(values, importance, n_blocks, nearest, tries, 2 * SCALE_TRIES) : all_lanes(0.0f);
    for (int64_t k = 0; k < n_blocks; k++)
        scales[k] = importance ? half_to_float(scale_for(best[k], 1.0f)) : extreme32(values + 32 * k) / -steps;
}

typedef struct {
    lanes scale, min, error; /* value = scale * code - min, min >= 0; squared error less the sum of squares */
} affine_fit;

/* Per lane, 32 values and their weights or NULL -> the best scale and minimum for codes 0 to top. */
affine_fit search_affine_lanes(const lanes *x, const lanes *weights, float top);

typedef struct {
    uint16_t d, dmin;         /* binary16 */
    uint8_t scale[8], min[8]; /* 0 to 63 */
    uint8_t codes[256];       /* 0 to top */
} affine_block;

/* 256 values -> value = d * scale * code - dmin * min in 8 sub-blocks, for Q4_K (top = 15) and Q5_K (top = 31).
 * importance: NULL, or a weight per value. */
void search_affine(const float *values, const float *importance, float top, affine_block *b);

/* The reverse of scale_and_min. */
void pack_scales(const affine_block *b, uint8_t *scales);

/* The low four bits of the codes: each 32 bytes hold two sub-blocks. */
void pack_low_codes(const affine_block *b, uint8_t *q);

#endif
