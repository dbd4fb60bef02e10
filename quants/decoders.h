/* Every format's decoder over many blocks, to be compiled wherever an instruction set makes it faster; the bits are
 * the same. */
#ifndef DG_DECODERS_H
#define DG_DECODERS_H

#include "every_format.h"

#define DG_FORMAT(NAME, id, stem, block, encodes)                                           \
    static void stem##_decode_blocks(const void *blocks, float *values, int64_t n_blocks) { \
        const block_##stem *b = blocks;                                                     \
        for (int64_t i = 0; i < n_blocks; i++) stem##_decode(b + i, values + i * (block));  \
    }
#include "formats.def"
#undef DG_FORMAT

#endif
