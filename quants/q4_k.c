#include "encode.h"
#include "q4_k.h"
#include "search.h"

void q4_k_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    block_q4_k *b = blocks;
    for (int64_t n = 0; n < n_blocks; n++) {
        affine_block found;
        search_affine(values + 256 * n, importance ? importance + 256 * n : NULL, 15.0f, &found);
        b[n].d = found.d;
        b[n].dmin = found.dmin;
        pack_scales(&found, b[n].scales);
        pack_low_codes(&found, b[n].q);
    }
}
