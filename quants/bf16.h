/* BF16: bfloat16: the upper half of a float32. */
#ifndef DG_BF16_H
#define DG_BF16_H
#include "blocks.h"

typedef struct {
    uint16_t v;
} block_bf16;
DG_BLOCK_SIZE(block_bf16, 2);

DG_HD static inline void bf16_decode(const block_bf16 *b, float *values) { values[0] = bf16_to_float(b->v); }

#endif
