/* IQ4_NL: 32 values as 4-bit codes into 16 uneven levels times one half-precision scale. value = d * level(q). */
#ifndef DG_IQ4_NL_H
#define DG_IQ4_NL_H
#include "blocks.h"

typedef struct {
    uint16_t d;    /* scale, binary16 */
    uint8_t q[16]; /* value i in the low half of q[i], value i + 16 in the high half */
} block_iq4_nl;
DG_BLOCK_SIZE(block_iq4_nl, 18);

/* The levels, rising, dense near zero as weights are; 0 <= q < 16. */
DG_HD static inline float iq4_level(int q) {
    const int8_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return (float)levels[q];
}

/* 16 bytes -> 32 values, here and in each sub-block of IQ4_XS. */
DG_HD static inline void iq4_decode(float d, const uint8_t *q, float *values) {
    for (int i = 0; i < 16; i++) {
        values[i] = d * iq4_level(q[i] & 15);
        values[i + 16] = d * iq4_level(q[i] >> 4);
    }
}

DG_HD static inline void iq4_nl_decode(const block_iq4_nl *b, float *values) {
    iq4_decode(half_to_float(b->d), b->q, values);
}

#endif
