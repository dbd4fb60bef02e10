#include "encode.h"
#include "q4_0.h"
#include "search.h"

static inline lanes q4_0_nearest(lanes v) { return round_lanes(clamp_lanes(v, -8.0f, 7.0f)); }

void q4_0_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    block_q4_0 *b = blocks;
    float d[LANES] = {0};
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        const float *weights = importance ? importance + 32 * k : NULL;
        if (k % LANES == 0)
            block_scales(values, weights, n_blocks - k < LANES ? n_blocks - k : LANES, 8.0f, q4_0_nearest, d);
        uint8_t codes[32];
        uniform_codes(values, 32, 0.0f, inverse_or_zero(d[k % LANES]), 8.5f, 15.0f, codes);
        b[k].d = half_from_float(d[k % LANES]);
        pack_halves(codes, b[k].q);
    }
}
