/* Q4_K: 8 sub-blocks of 32 values, 4-bit codes, 6-bit scales and minimums. value = d * scale * q - dmin * min. */
#ifndef DG_Q4_K_H
#define DG_Q4_K_H
#include "codes.h"

typedef struct {
    uint16_t d;         /* scale of the scales, binary16 */
    uint16_t dmin;      /* scale of the minimums, binary16 */
    uint8_t scales[12]; /* scale_and_min */
    uint8_t q[128];     /* each 32 bytes hold two sub-blocks: one in the low halves, the next in the high halves */
} block_q4_k;
DG_BLOCK_SIZE(block_q4_k, 144);

DG_HD static inline void q4_k_decode(const block_q4_k *b, float *values) {
    const float d = half_to_float(b->d), dmin = half_to_float(b->dmin);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_and_min(b->scales, j, &scale, &min);
        const float ds = d * (float)scale, dm = dmin * (float)min;
        const uint8_t *q = b->q + j / 2 * 32;
        for (int i = 0; i < 32; i++) values[32 * j + i] = ds * (float)(q[i] >> j % 2 * 4 & 15) - dm;
    }
}

#endif
