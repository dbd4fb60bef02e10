/* Q5_K: 8 sub-blocks of 32 values, 5-bit codes, 6-bit scales and minimums. value = d * scale * q - dmin * min. */
#ifndef DG_Q5_K_H
#define DG_Q5_K_H
#include "codes.h"

typedef struct {
    uint16_t d;         /* scale of the scales, binary16 */
    uint16_t dmin;      /* scale of the minimums, binary16 */
    uint8_t scales[12]; /* scale_and_min */
    uint8_t high[32];   /* bit j of high[i] is the fifth bit of value i of sub-block j */
    uint8_t q[128];     /* each 32 bytes hold two sub-blocks: one in the low halves, the next in the high halves */
} block_q5_k;
DG_BLOCK_SIZE(block_q5_k, 176);

DG_HD static inline void q5_k_decode(const block_q5_k *b, float *values) {
    const float d = half_to_float(b->d), dmin = half_to_float(b->dmin);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        scale_and_min(b->scales, j, &scale, &min);
        const float ds = d * (float)scale, dm = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            const int q = (b->q[j / 2 * 32 + i] >> j % 2 * 4 & 15) | (b->high[i] >> j & 1) << 4;
            values[32 * j + i] = ds * (float)q - dm;
        }
    }
}

#endif
