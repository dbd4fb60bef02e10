/* Q4_0: 32 values as 4-bit codes times one half-precision scale. value = d * (q - 8). */
#ifndef DG_Q4_0_H
#define DG_Q4_0_H
#include "blocks.h"

typedef struct {
    uint16_t d;    /* scale, binary16 */
    uint8_t q[16]; /* value i in the low half of q[i], value i + 16 in the high half */
} block_q4_0;
DG_BLOCK_SIZE(block_q4_0, 18);

DG_HD static inline void q4_0_decode(const block_q4_0 *b, float *values) {
    const float d = half_to_float(b->d);
    for (int i = 0; i < 16; i++) {
        values[i] = d * (float)((b->q[i] & 15) - 8);
        values[i + 16] = d * (float)((b->q[i] >> 4) - 8);
    }
}

#endif
