/* Q3_K: 16 sub-blocks of 16 values, 3-bit codes, 6-bit scales. value = d * (scale - 32) * (q - 4). Decode only. */
#ifndef DG_Q3_K_H
#define DG_Q3_K_H
#include "codes.h"

typedef struct {
    uint8_t high[32];   /* bit k of high[i] is the third bit of value i + 32 k */
    uint8_t q[64];      /* low two bits: code2 */
    uint8_t scales[12]; /* low four bits in the halves of bytes 0 to 7, high two bits in bytes 8 to 11 */
    uint16_t d;         /* scale of the scales, binary16 */
} block_q3_k;
DG_BLOCK_SIZE(block_q3_k, 110);

DG_HD static inline void q3_k_decode(const block_q3_k *b, float *values) {
    const float d = half_to_float(b->d);
    for (int j = 0; j < 16; j++) {
        const int scale = (b->scales[j % 8] >> j / 8 * 4 & 15) | (b->scales[8 + j % 4] >> j / 4 * 2 & 3) << 4;
        const float ds = d * (float)(scale - 32);
        for (int i = 16 * j; i < 16 * (j + 1); i++)
            values[i] = ds * (float)((code2(b->q, i) | (b->high[i % 32] >> i / 32 & 1) << 2) - 4);
    }
}

#endif
