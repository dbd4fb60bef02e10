#include "encode.h"
#include "q5_k.h"
#include "search.h"

void q5_k_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    block_q5_k *b = blocks;
    for (int64_t n = 0; n < n_blocks; n++) {
        affine_block found;
        search_affine(values + 256 * n, importance ? importance + 256 * n : NULL, 31.0f, &found);
        b[n].d = found.d;
        b[n].dmin = found.dmin;
        pack_scales(&found, b[n].scales);
        pack_low_codes(&found, b[n].q);
        for (int i = 0; i < 32; i++) {
            int bits = 0;
            for (int j = 0; j < 8; j++) bits |= found.codes[32 * j + i] >> 4 << j;
            b[n].high[i] = (uint8_t)bits;
        }
    }
}
