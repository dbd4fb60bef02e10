#include "encode.h"
#include "q5_0.h"
#include "search.h"

static inline lanes q5_0_nearest(lanes v) { return round_lanes(clamp_lanes(v, -16.0f, 15.0f)); }

void q5_0_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    block_q5_0 *b = blocks;
    float d[LANES] = {0};
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        const float *weights = importance ? importance + 32 * k : NULL;
        if (k % LANES == 0)
            block_scales(values, weights, n_blocks - k < LANES ? n_blocks - k : LANES, 16.0f, q5_0_nearest, d);
        uint8_t codes[32];
        uniform_codes(values, 32, 0.0f, inverse_or_zero(d[k % LANES]), 16.5f, 31.0f, codes);
        b[k].d = half_from_float(d[k % LANES]);
        pack_fifth_bits(codes, b[k].high);
        pack_halves(codes, b[k].q);
    }
}
