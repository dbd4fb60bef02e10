#include "encode.h"
#include "q5_0.h"
#include "uniform.h"

void q5_0_encode(const float *values, void *blocks, int64_t n_blocks) {
    block_q5_0 *b = blocks;
    for (int64_t k = 0; k < n_blocks; k++, values += 32) {
        const float d = extreme32(values) / -16.0f;
        uint8_t codes[32];
        uniform_codes(values, 32, 0.0f, inverse_or_zero(d), 16.5f, 31.0f, codes);
        b[k].d = half_from_float(d);
        pack_fifth_bits(codes, b[k].high);
        pack_halves(codes, b[k].q);
    }
}
