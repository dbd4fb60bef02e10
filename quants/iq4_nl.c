#include "encode.h"
#include "iq4_nl.h"
#include "search.h"

/* Where level t + 1 becomes nearer than level t. */
static inline float iq4_middle(int t) { return (iq4_level(t) + iq4_level(t + 1)) * 0.5f; }

static inline lanes iq4_nearest(lanes v) {
    lanes level = all_lanes(iq4_level(0));
    for (int t = 0; t < 15; t++) {
        const lanes step = all_lanes(iq4_level(t + 1) - iq4_level(t));
        level += (lanes)((v > all_lanes(iq4_middle(t))) & (lane_mask)step);
    }
    return level;
}

static void iq4_block(const float *values, float scale, block_iq4_nl *b) {
    b->d = half_from_float(scale);
    const float inverse = inverse_or_zero(half_to_float(b->d));
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) {
        const float v = values[i] * inverse;
        int code = 0;
        for (int t = 0; t < 15; t++) code += v > iq4_middle(t);
        codes[i] = (uint8_t)code;
    }
    pack_halves(codes, b->q);
}

void iq4_nl_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    /* where errors have weights, also those that put the value of largest magnitude at the other end */
    static const float tries[] = {105.0f, 112.0f, 119.0f,  126.0f,  133.0f,  140.0f,  98.0f,
                                  -90.0f, -97.0f, -104.0f, -111.0f, -118.0f, -125.0f, -132.0f};
    enum { PLAIN = 6, WEIGHTED = sizeof tries / sizeof *tries };
    block_iq4_nl *b = blocks;
    for (int64_t n = 0; n < n_blocks; n += LANES) {
        const int64_t left = n_blocks - n < LANES ? n_blocks - n : LANES;
        const float *weights = importance ? importance + 32 * n : NULL;
        const lanes scale =
            search_blocks(values + 32 * n, weights, left, iq4_nearest, tries, weights ? WEIGHTED : PLAIN);
        for (int64_t k = 0; k < left; k++) iq4_block(values + 32 * (n + k), scale[k], b + n + k);
    }
}
