/* Scales with minimums: Q4_K and Q5_K, and Q5_1 where weights are given. */
#include "search.h"

typedef struct {
    lanes q, qq, qx; /* weighted sums of codes, of their squares, and of their products with the values */
} affine_sums;

/* The sums for codes = (x + min) * inverse, rounded, 0 to top. */
static inline affine_sums affine_codes(const lanes *x, const lanes *weights, float top, lanes min, lanes inverse) {
    affine_sums s = {{0}, {0}, {0}};
    for (int i = 0; i < 32; i++) {
        const lanes q = round_lanes(clamp_lanes((x[i] + min) * inverse, 0.0f, top)), wq = weights ? weights[i] * q : q;
        s.q += wq;
        s.qq += wq * q;
        s.qx += wq * x[i];
    }
    return s;
}

typedef struct {
    lanes weight, wx; /* sums of the weights, and of their products with the values */
} affine_totals;

/* Fits scale and minimum to such codes by least squares, and keeps them in *best where the error is smaller. */
static inline void affine_try(const lanes *x, const lanes *weights, affine_totals of, float top, lanes min,
                              lanes inverse, affine_fit *best) {
    const affine_sums s = affine_codes(x, weights, top, min, inverse);
    const lanes zero = all_lanes(0.0f);
    lanes scale = ratio(of.weight * s.qx - s.q * of.wx, of.weight * s.qq - s.q * s.q);
    lanes m = ratio(scale * s.q - of.wx, of.weight);
    const lane_mask positive = m > zero; /* else the best minimum that can be stored is 0 */
    scale = choose(positive, scale, ratio(s.qx, s.qq));
    m = choose(positive, m, zero);
    const lanes error = scale * (scale * s.qq - 2.0f * (s.qx + m * s.q)) + m * (of.weight * m + 2.0f * of.wx);
    const lane_mask better = error < best->error;
    best->error = choose(better, error, best->error);
    best->scale = choose(better, scale, best->scale);
    best->min = choose(better, m, best->min);
}

static inline affine_fit affine_search(const lanes *x, const lanes *weights, float top) {
    lanes low = all_lanes(0.0f), high = x[0];
    affine_totals of = {.weight = low, .wx = low};
    for (int i = 0; i < 32; i++) {
        low = choose(x[i] < low, x[i], low);
        high = choose(x[i] > high, x[i], high);
        of.weight += weights ? weights[i] : all_lanes(1.0f);
        of.wx += weights ? weights[i] * x[i] : x[i];
    }
    affine_fit best = {.scale = {0}, .min = {0}, .error = {0}};
    const lanes unit = ratio(all_lanes(1.0f), high - low);
    /* tried: steps a little wider or narrower than the range asks for, then twice the best fit so far */
    for (int t = 0; t < 8; t++) affine_try(x, weights, of, top, -low, (top - 2.0f + 0.4f * (float)t) * unit, &best);
    for (int t = 0; t < 2; t++) affine_try(x, weights, of, top, best.min, ratio(all_lanes(1.0f), best.scale), &best);
    return best;
}

/* Two copies of the search, so that the one without weights does not pay for them. */
affine_fit search_affine_lanes(const lanes *x, const lanes *weights, float top) {
    return weights ? affine_search(x, weights, top) : affine_search(x, NULL, top);
}

static float largest8(const float *v) {
    float most = 0.0f;
    for (int i = 0; i < 8; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* v[8] = codes * d as well as codes 0 to 63 can. */
static void quantize8(float *v, float d, uint8_t *codes) {
    const float inverse = inverse_or_zero(d);
    for (int i = 0; i < 8; i++) {
        codes[i] = (uint8_t)(int32_t)clamp(v[i] * inverse + 0.5f, 0.0f, 63.0f);
        v[i] = d * (float)codes[i];
    }
}

void search_affine(const float *values, const float *importance, float top, affine_block *b) {
    lanes x[2][32], w[2][32];
    const lanes *weights[2];
    union {
        lanes half[2];
        float of[8];
    } scale, min;
    for (int h = 0; h < 2; h++) {
        lanes_load(values + 128 * h, 32, x[h]);
        weights[h] = lanes_load_weights(importance ? importance + 128 * h : NULL, 32, w[h]);
        const affine_fit fit = search_affine_lanes(x[h], weights[h], top);
        scale.half[h] = fit.scale;
        min.half[h] = fit.min;
    }
    /* minimums first: the scales are then fitted to what rounding made of them */
    b->dmin = scale_for(largest8(min.of), 63.0f);
    quantize8(min.of, half_to_float(b->dmin), b->min);
    for (int h = 0; h < 2; h++) {
        const affine_sums s = affine_codes(x[h], weights[h], top, min.half[h], ratio(all_lanes(1.0f), scale.half[h]));
        scale.half[h] = ratio(s.qx + min.half[h] * s.q, s.qq);
    }
    b->d = scale_for(largest8(scale.of), 63.0f);
    quantize8(scale.of, half_to_float(b->d), b->scale);
    for (int k = 0; k < 8; k++)
        uniform_codes(values + 32 * k, 32, -min.of[k], inverse_or_zero(scale.of[k]), 0.5f, top, b->codes + 32 * k);
}

void pack_scales(const affine_block *b, uint8_t *scales) {
    for (int i = 0; i < 4; i++) {
        scales[i] = (uint8_t)(b->scale[i] | b->scale[i + 4] >> 4 << 6);
        scales[i + 4] = (uint8_t)(b->min[i] | b->min[i + 4] >> 4 << 6);
        scales[i + 8] = (uint8_t)((b->scale[i + 4] & 15) | (b->min[i + 4] & 15) << 4);
    }
}

void pack_low_codes(const affine_block *b, uint8_t *q) {
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 32; i++)
            q[32 * p + i] = (uint8_t)((b->codes[64 * p + i] & 15) | b->codes[64 * p + 32 + i] << 4);
}
