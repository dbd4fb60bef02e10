#include "encode.h"
#include "q4_0.h"
#include "uniform.h"

void q4_0_encode(const float *values, void *blocks, int64_t n_blocks) {
    block_q4_0 *b = blocks;
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        const float d = extreme32(values) / -8.0f;
        uint8_t codes[32];
        uniform_codes(values, 32, 0.0f, inverse_or_zero(d), 8.5f, 15.0f, codes);
        b[k].d = half_from_float(d);
        pack_halves(codes, b[k].q);
    }
}
