/* Q6_K: 16 sub-blocks of 16 values, 6-bit codes, 8-bit scales. value = d * scale * (q - 32). */
#ifndef DG_Q6_K_H
#define DG_Q6_K_H
#include "blocks.h"

typedef struct {
    uint8_t low[128]; /* low four bits: of each 128 values, 64 in the low halves of 64 bytes, 64 in the high halves */
    uint8_t high[64]; /* high two bits: a byte holds those of four values that are 32 apart */
    int8_t scales[16];
    uint16_t d; /* scale of the scales, binary16 */
} block_q6_k;
DG_BLOCK_SIZE(block_q6_k, 210);

DG_HD static inline void q6_k_decode(const block_q6_k *b, float *values) {
    const float d = half_to_float(b->d);
    for (int j = 0; j < 16; j++) {
        const float ds = d * (float)b->scales[j];
        const uint8_t *low = b->low + j / 8 * 64 + j % 4 * 16, *high = b->high + j / 8 * 32 + j % 2 * 16;
        const int shift_low = j % 8 / 4 * 4, shift_high = j % 8 / 2 * 2;
        for (int i = 0; i < 16; i++)
            values[16 * j + i] = ds * (float)(((low[i] >> shift_low & 15) | (high[i] >> shift_high & 3) << 4) - 32);
    }
}

#endif
