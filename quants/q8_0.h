/* Q8_0: 32 values as int8 times one half-precision scale. value = d * q. */
#ifndef DG_Q8_0_H
#define DG_Q8_0_H
#include "blocks.h"

typedef struct {
    uint16_t d;   /* scale, binary16 */
    int8_t q[32];
} block_q8_0;
DG_BLOCK_SIZE(block_q8_0, 34);

DG_HD static inline void q8_0_decode(const block_q8_0 *b, float *values) {
    const float d = half_to_float(b->d);
    for (int i = 0; i < 32; i++) values[i] = d * (float)b->q[i];
}

#endif
