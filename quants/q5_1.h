/* Q5_1: 32 values as 5-bit codes with a half-precision scale and minimum. value = d * q + m. */
#ifndef DG_Q5_1_H
#define DG_Q5_1_H
#include "codes.h"

typedef struct {
    uint16_t d;      /* scale, binary16 */
    uint16_t m;      /* minimum, binary16 */
    uint8_t high[4]; /* bit i is the fifth bit of value i */
    uint8_t q[16];   /* low four bits: value i in the low half of q[i], value i + 16 in the high half */
} block_q5_1;
DG_BLOCK_SIZE(block_q5_1, 24);

DG_HD static inline void q5_1_decode(const block_q5_1 *b, float *values) {
    const float d = half_to_float(b->d), m = half_to_float(b->m);
    for (int i = 0; i < 32; i++) values[i] = d * (float)code5(b->q, b->high, i) + m;
}

#endif
