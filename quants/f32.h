/* F32: float32, as it is. */
#ifndef DG_F32_H
#define DG_F32_H
#include "blocks.h"

typedef struct {
    float v;
} block_f32;
DG_BLOCK_SIZE(block_f32, 4);

DG_HD static inline void f32_decode(const block_f32 *b, float *values) { values[0] = b->v; }

#endif
