/* The search for scales. It works on four sub-blocks side by side, one per lane of a vector, so that sums run down the
 * lanes and nothing branches. Vectors are the compiler's own (gcc, clang): four floats on every processor. */
#ifndef DG_SEARCH_H
#define DG_SEARCH_H
#include "uniform.h"

typedef float lanes __attribute__((vector_size(16)));
typedef int32_t lane_mask __attribute__((vector_size(16))); /* of a comparison: -1 or 0 per lane */
enum { LANES = 4 };

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

/* values[LANES][n] -> x[n]; NaN becomes 0, and what no format can hold is cut off, so that every sum stays finite. */
static inline void lanes_load(const float *values, int n, lanes *x) {
    for (int i = 0; i < n; i++) {
        const lanes v = {values[i], values[n + i], values[2 * n + i], values[3 * n + i]};
        x[i] = clamp_lanes(choose(v == v, v, all_lanes(0.0f)), -1e9f, 1e9f);
    }
}

/* A half-precision scale of which `largest` is `steps` times; cut off at the largest finite half. */
static inline uint16_t scale_for(float largest, float steps) {
    return half_from_float(clamp(largest / steps, -65504.0f, 65504.0f));
}

/* The scale per lane with which codes, as `nearest` finds them, reproduce n values best: the least-squares fit to the
 * codes of the best of several tries. A try of t puts the value of largest magnitude, with its sign, at -t. */
static inline lanes search_scale(const lanes *x, int n, lanes (*nearest)(lanes), const float *tries, int n_tries) {
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
            const lanes q = nearest(x[i] * inverse);
            qx += q * x[i];
            qq += q * q;
        }
        const lanes fit = ratio(qx, qq), explained = fit * qx;
        const lane_mask better = explained > best;
        best = choose(better, explained, best);
        scale = choose(better, fit, scale);
    }
    return scale;
}

typedef struct {
    uint16_t d, dmin;         /* binary16 */
    uint8_t scale[8], min[8]; /* 0 to 63 */
    uint8_t codes[256];       /* 0 to top */
} affine_block;

/* 256 values -> value = d * scale * code - dmin * min in 8 sub-blocks, for Q4_K (top = 15) and Q5_K (top = 31). */
void search_affine(const float *values, float top, affine_block *b);

/* The reverse of scale_and_min. */
void pack_scales(const affine_block *b, uint8_t *scales);

/* The low four bits of the codes: each 32 bytes hold two sub-blocks. */
void pack_low_codes(const affine_block *b, uint8_t *q);

#endif
