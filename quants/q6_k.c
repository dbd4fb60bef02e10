#include "encode.h"
#include "q6_k.h"
#include "search.h"

static inline lanes q6_k_nearest(lanes v) { return round_lanes(clamp_lanes(v, -32.0f, 31.0f)); }

void q6_k_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    enum { N_TRIES = 8 };
    static const float tries[N_TRIES] = {25.0f, 26.0f, 27.0f, 28.0f, 29.0f, 30.0f, 31.0f, 32.0f};
    block_q6_k *b = blocks;
    for (int64_t n = 0; n < n_blocks; n++, b++, values += 256) {
        union {
            lanes four[4];
            float of[16];
        } scale;
        lanes x[16], w[16];
        for (int j = 0; j < 4; j++) {
            lanes_load(values + 64 * j, 16, x);
            const lanes *weights = lanes_load_weights(importance ? importance + 256 * n + 64 * j : NULL, 16, w);
            scale.four[j] = weights ? search_scale(x, weights, 16, q6_k_nearest, tries, N_TRIES)
                                    : search_scale(x, NULL, 16, q6_k_nearest, tries, N_TRIES);
        }
        float low = 0.0f, high = 0.0f;
        for (int j = 0; j < 16; j++) {
            low = scale.of[j] < low ? scale.of[j] : low;
            high = scale.of[j] > high ? scale.of[j] : high;
        }
        b->d = scale_for(high > -low ? high : low, -128.0f);
        const float d = half_to_float(b->d), inverse = inverse_or_zero(d);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            b->scales[j] = (int8_t)((int32_t)clamp(scale.of[j] * inverse + 128.5f, 0.0f, 255.0f) - 128);
            const float step = d * (float)b->scales[j];
            uniform_codes(values + 16 * j, 16, 0.0f, inverse_or_zero(step), 32.5f, 63.0f, codes + 16 * j);
        }
        for (int i = 0; i < 128; i++) {
            const uint8_t *code = codes + i / 64 * 128 + i % 64;
            b->low[i] = (uint8_t)((code[0] & 15) | code[64] << 4);
        }
        for (int i = 0; i < 64; i++) {
            const uint8_t *code = codes + i / 32 * 128 + i % 32;
            b->high[i] = (uint8_t)(code[0] >> 4 | code[32] >> 4 << 2 | code[64] >> 4 << 4 | code[96] >> 4 << 6);
        }
    }
}
