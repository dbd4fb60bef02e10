/* IQ4_XS: 8 sub-blocks of 32 values with the codes of IQ4_NL, 6-bit scales.
 * value = d * (scale - 32) * level(q). Decode only. */
#ifndef DG_IQ4_XS_H
#define DG_IQ4_XS_H
#include "iq4_nl.h"

typedef struct {
    uint16_t d;           /* scale of the scales, binary16 */
    uint16_t scales_high; /* high two bits of each scale */
    uint8_t scales_low[4]; /* low four bits, two scales a byte */
    uint8_t q[128];
} block_iq4_xs;
DG_BLOCK_SIZE(block_iq4_xs, 136);

/* The 6-bit scale of sub-block j of 8, before its offset of 32. */
DG_HD static inline int iq4_xs_scale(const block_iq4_xs *b, int j) {
    return (b->scales_low[j / 2] >> j % 2 * 4 & 15) | (b->scales_high >> 2 * j & 3) << 4;
}

DG_HD static inline void iq4_xs_decode(const block_iq4_xs *b, float *values) {
    const float d = half_to_float(b->d);
    for (int j = 0; j < 8; j++) iq4_decode(d * (float)(iq4_xs_scale(b, j) - 32), b->q + 16 * j, values + 32 * j);
}

#endif
