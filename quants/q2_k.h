/* Q2_K: 16 sub-blocks of 16 values, 2-bit codes, 4-bit scales and minimums.
 * value = d * scale * q - dmin * min. Decode only. */
#ifndef DG_Q2_K_H
#define DG_Q2_K_H
#include "codes.h"

typedef struct {
    uint8_t scales[16]; /* scale in the low half, minimum in the high half */
    uint8_t q[64];      /* code2 */
    uint16_t d;         /* scale of the scales, binary16 */
    uint16_t dmin;      /* scale of the minimums, binary16 */
} block_q2_k;
DG_BLOCK_SIZE(block_q2_k, 84);

DG_HD static inline void q2_k_decode(const block_q2_k *b, float *values) {
    const float d = half_to_float(b->d), dmin = half_to_float(b->dmin);
    for (int j = 0; j < 16; j++) {
        const float ds = d * (float)(b->scales[j] & 15), dm = dmin * (float)(b->scales[j] >> 4);
        for (int i = 16 * j; i < 16 * (j + 1); i++) values[i] = ds * (float)code2(b->q, i) - dm;
    }
}

#endif
