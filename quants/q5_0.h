/* Q5_0: 32 values as 5-bit codes times one half-precision scale. value = d * (q - 16). */
#ifndef DG_Q5_0_H
#define DG_Q5_0_H
#include "codes.h"

typedef struct {
    uint16_t d;      /* scale, binary16 */
    uint8_t high[4]; /* bit i is the fifth bit of value i */
    uint8_t q[16];   /* low four bits: value i in the low half of q[i], value i + 16 in the high half */
} block_q5_0;
DG_BLOCK_SIZE(block_q5_0, 22);

DG_HD static inline void q5_0_decode(const block_q5_0 *b, float *values) {
    const float d = half_to_float(b->d);
    for (int i = 0; i < 32; i++) values[i] = d * (float)(code5(b->q, b->high, i) - 16);
}

#endif
