/* How formats pack codes and scales into bytes, where more than one packs them in the same way. */
#ifndef DG_CODES_H
#define DG_CODES_H
#include "blocks.h"

/* Q5_0, Q5_1: the 5-bit code of value i of 32. */
DG_HD static inline int code5(const uint8_t *low, const uint8_t *high, int i) {
    return (low[i & 15] >> (i & 16) / 4 & 15) | (high[i >> 3] >> (i & 7) & 1) << 4;
}

/* Q4_K, Q5_K: scale and minimum of sub-block i, 6 bits each. The first four of each fill the low bits of bytes 0 to 7;
 * of the last four, bytes 8 to 11 hold the low four bits and the top of bytes 0 to 7 the high two. */
DG_HD static inline void scale_and_min(const uint8_t *scales, int i, int *scale, int *min) {
    if (i < 4) {
        *scale = scales[i] & 63;
        *min = scales[i + 4] & 63;
    } else {
        *scale = (scales[i + 4] & 15) | scales[i - 4] >> 6 << 4;
        *min = scales[i + 4] >> 4 | scales[i] >> 6 << 4;
    }
}

/* Q2_K, Q3_K: the 2-bit code of value i of 256; a byte holds values that are 32 apart. */
DG_HD static inline int code2(const uint8_t *q, int i) { return q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3; }

#endif
