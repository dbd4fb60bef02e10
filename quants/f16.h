/* F16: IEEE binary16. */
#ifndef DG_F16_H
#define DG_F16_H
#include "blocks.h"

typedef struct {
    uint16_t v;
} block_f16;
DG_BLOCK_SIZE(block_f16, 2);

DG_HD static inline void f16_decode(const block_f16 *b, float *values) { values[0] = half_to_float(b->v); }

#endif
