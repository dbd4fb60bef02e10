/* Unpacks the codes and scales of a row's column block, for each format, in plain C that compilers vectorise. `at` is
 * the first block; codes[depth] are written to memory, and the scales of row r to the panel. Each instruction set's
 * products include this file.
 */
#ifndef DG_GEMM_ROWS_H
#define DG_GEMM_ROWS_H

#include "every_format.h"
#include "gemm.h"

/* Codes that are stored with an offset: the products start at -offset * (sum of the activations). */
enum { OFFSET_SUB_32 = 16, OFFSET_SUB_16 = 32 };

static inline void set_scale(gemm_panel *p, int sub, int r, int scale) {
    int16_t *at = p->scales + (sub * GEMM_ROWS + r) * 2;
    at[0] = at[1] = (int16_t)scale;
}

static inline void set_min(gemm_panel *p, int sub, int r, int min) {
    p->mins[(sub / 2 * GEMM_ROWS + r) * 2 + sub % 2] = (int16_t)min;
}

static inline void row_q4_k(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) {
    const block_q4_k *b = (const block_q4_k *)(const void *)at;
    p->d[r] = half_to_float(b->d);
    p->m[r] = half_to_float(b->dmin);
    for (int s = 0; s < 8; s++) {
        int scale, min;
        scale_and_min(b->scales, s, &scale, &min);
        set_scale(p, s, r, scale);
        set_min(p, s, r, min);
    }
    for (int s = 0; s < 4; s++)
        for (int i = 0; i < 32; i++) {
            codes[64 * s + i] = b->q[32 * s + i] & 15;
            codes[64 * s + 32 + i] = b->q[32 * s + i] >> 4;
        }
}

static inline void row_q5_k(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) {
    const block_q5_k *b = (const block_q5_k *)(const void *)at;
    p->d[r] = half_to_float(b->d);
    p->m[r] = half_to_float(b->dmin);
    for (int s = 0; s < 8; s++) { /* 5-bit codes overflow int16 over 32 columns: each scale serves twice 16 */
        int scale, min;
        scale_and_min(b->scales, s, &scale, &min);
        set_scale(p, 2 * s, r, scale);
        set_scale(p, 2 * s + 1, r, scale);
        set_min(p, s, r, min);
    }
    for (int s = 0; s < 4; s++)
        for (int i = 0; i < 32; i++) {
            codes[64 * s + i] = (uint8_t)((b->q[32 * s + i] & 15) | (b->high[i] >> 2 * s & 1) << 4);
            codes[64 * s + 32 + i] = (uint8_t)(b->q[32 * s + i] >> 4 | (b->high[i] >> (2 * s + 1) & 1) << 4);
        }
}

static inline void row_q6_k(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) {
    const block_q6_k *b = (const block_q6_k *)(const void *)at;
    p->d[r] = half_to_float(b->d);
    for (int s = 0; s < 16; s++) set_scale(p, s, r, b->scales[s]);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i++) {
            const uint8_t l0 = b->low[64 * h + i], l1 = b->low[64 * h + 32 + i], u = b->high[32 * h + i];
            codes[128 * h + i] = (uint8_t)((l0 & 15) | (u & 3) << 4);
            codes[128 * h + 32 + i] = (uint8_t)((l1 & 15) | (u >> 2 & 3) << 4);
            codes[128 * h + 64 + i] = (uint8_t)(l0 >> 4 | (u >> 4 & 3) << 4);
            codes[128 * h + 96 + i] = (uint8_t)(l1 >> 4 | (u >> 6 & 3) << 4);
        }
}

/* 16 in byte i where bit i is set */
static inline uint64_t fifth_bits(uint8_t bits) {
    const uint64_t one = (bits * 0x0101010101010101ull) & 0x8040201008040201ull;
    return (((one & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | one) >> 3 & 0x1010101010101010ull;
}

static inline void codes5(const uint8_t *q, const uint8_t *high, uint8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = q[i] & 15;
        codes[16 + i] = q[i] >> 4;
    }
    for (int k = 0; k < 4; k++) {
        uint64_t eight;
        memcpy(&eight, codes + 8 * k, 8);
        eight |= fifth_bits(high[k]);
        memcpy(codes + 8 * k, &eight, 8);
    }
}

static inline void row_q5_0(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) {
    const block_q5_0 *b = (const block_q5_0 *)(const void *)at;
    for (int64_t s = 0; s < p->depth / 32; s++) {
        p->d[s * GEMM_ROWS + r] = half_to_float(b[s].d);
        codes5(b[s].q, b[s].high, codes + 32 * s);
    }
}

/* d q + m = d (q - 16) + (m + 16 d) */
static inline void row_q5_1(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) {
    const block_q5_1 *b = (const block_q5_1 *)(const void *)at;
    for (int64_t s = 0; s < p->depth / 32; s++) {
        p->d[s * GEMM_ROWS + r] = half_to_float(b[s].d);
        p->m[s * GEMM_ROWS + r] = half_to_float(b[s].m) + OFFSET_SUB_32 * half_to_float(b[s].d);
        codes5(b[s].q, b[s].high, codes + 32 * s);
    }
}

static inline void row_q4_0(gemm_panel *p, int r, const uint8_t *at, uint8_t *codes) { /* q - 8 = (q + 8) - 16 */
    const block_q4_0 *b = (const block_q4_0 *)(const void *)at;
    for (int64_t s = 0; s < p->depth / 32; s++) {
        p->d[s * GEMM_ROWS + r] = half_to_float(b[s].d);
        for (int i = 0; i < 16; i++) {
            codes[32 * s + i] = (uint8_t)((b[s].q[i] & 15) + 8);
            codes[32 * s + 16 + i] = (uint8_t)((b[s].q[i] >> 4) + 8);
        }
    }
}

/* ---- signed codes of 8 bits ---- */

static inline void row_q8_0(gemm_panel *p, int r, const uint8_t *at, int8_t *codes) {
    const block_q8_0 *b = (const block_q8_0 *)(const void *)at;
    for (int64_t s = 0; s < p->depth / 32; s++) {
        p->d[s * GEMM_ROWS + r] = half_to_float(b[s].d);
        memcpy(codes + 32 * s, b[s].q, 32);
    }
}

static inline void levels4(const uint8_t *q, int8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = (int8_t)iq4_level(q[i] & 15);
        codes[16 + i] = (int8_t)iq4_level(q[i] >> 4);
    }
}

static inline void row_iq4_nl(gemm_panel *p, int r, const uint8_t *at, int8_t *codes) {
    const block_iq4_nl *b = (const block_iq4_nl *)(const void *)at;
    for (int64_t s = 0; s < p->depth / 32; s++) {
        p->d[s * GEMM_ROWS + r] = half_to_float(b[s].d);
        levels4(b[s].q, codes + 32 * s);
    }
}

static inline void row_iq4_xs(gemm_panel *p, int r, const uint8_t *at, int8_t *codes) {
    const block_iq4_xs *b = (const block_iq4_xs *)(const void *)at;
    for (int64_t k = 0; k < p->depth / 256; k++)
        for (int s = 0; s < 8; s++) {
            p->d[(8 * k + s) * GEMM_ROWS + r] = half_to_float(b[k].d) * (float)(iq4_xs_scale(b + k, s) - 32);
            levels4(b[k].q + 16 * s, codes + 256 * k + 32 * s);
        }
}

#endif
