#include <math.h>

#include "encode.h"
#include "q8_0.h"

void q8_0_encode(const float *values, void *blocks, int64_t n_blocks) {
    block_q8_0 *b = blocks;
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        float peak = 0.0f;
        for (int i = 0; i < 32; i++) peak = fmaxf(peak, fabsf(values[i]));
        const float d = peak / 127.0f;
        const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        b[k].d = half_from_float(d);
        for (int i = 0; i < 32; i++) b[k].q[i] = (int8_t)roundf(values[i] * inverse);
    }
}
