/* Integer products on NEON with the dot product instructions: four signed codes times four signed activations, added to
 * int32; a lane of the activations is broadcast by the instruction itself. 16 rows of a panel are 4 vectors.
 */
#include "gemm.h"

#include <arm_neon.h>

#include "gemm_rows.h"
#include "gemm_vocabulary.h"

enum { QUARTERS = GEMM_ROWS / 4, TILE = 4 };

/* ---- Panels: signed codes [depth / 4][16 rows][4] ---- */

/* 4 rows of 16 bytes -> 4 groups of 4 rows by 4 bytes, 64 bytes apart */
INLINE void transpose4(const int8_t *rows, int64_t stride, uint8_t *out) {
    uint32x4_t r[4];
    for (int i = 0; i < 4; i++) r[i] = vreinterpretq_u32_s8(vld1q_s8(rows + i * stride));
    const uint32x4_t a = vtrn1q_u32(r[0], r[1]), b = vtrn2q_u32(r[0], r[1]), c = vtrn1q_u32(r[2], r[3]),
                     d = vtrn2q_u32(r[2], r[3]);
#define PAIR(op, x, y) vreinterpretq_u8_u64(op(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)))
    vst1q_u8(out, PAIR(vtrn1q_u64, a, c));
    vst1q_u8(out + 64, PAIR(vtrn1q_u64, b, d));
    vst1q_u8(out + 128, PAIR(vtrn2q_u64, a, c));
    vst1q_u8(out + 192, PAIR(vtrn2q_u64, b, d));
}

/* offset: what unsigned codes count from */
#define UNPACK(stem, columns, offset)                                                                                \
    static void unpack_##stem(gemm_panel *p, const uint8_t *const *rows, int64_t b) {                                \
        int8_t codes[GEMM_ROWS * GEMM_DEPTH];                                                                        \
        const int64_t bytes = p->depth / (columns) * (int64_t)sizeof(block_##stem);                                  \
        for (int r = 0; r < GEMM_ROWS; r++) row_##stem(p, r, rows[r] + b * bytes, (void *)(codes + r * GEMM_DEPTH)); \
        for (int64_t i = 0; (offset) != 0 && i < GEMM_ROWS * GEMM_DEPTH; i += GEMM_DEPTH)                            \
            for (int64_t c = 0; c < p->depth; c++) codes[i + c] = (int8_t)(codes[i + c] - (offset));                 \
        for (int64_t c = 0; c < p->depth; c += 16)                                                                   \
            for (int q = 0; q < QUARTERS; q++)                                                                       \
                transpose4(codes + 4 * q * GEMM_DEPTH + c, GEMM_DEPTH, p->codes + c * GEMM_ROWS + 16 * q);           \
    }
UNPACK(q4_k, 256, 0)
UNPACK(q5_k, 256, 0)
UNPACK(q6_k, 256, 32)
UNPACK(q5_0, 32, OFFSET_SUB_32)
UNPACK(q5_1, 32, OFFSET_SUB_32)
UNPACK(q4_0, 32, OFFSET_SUB_32)
UNPACK(q8_0, 32, 0)
UNPACK(iq4_nl, 32, 0)
UNPACK(iq4_xs, 256, 0)

/* ---- Products ---- */

/* acc[t][q] += codes . x[t] over 16 columns */
INLINE void multiply_16(int32x4_t acc[TILE][QUARTERS], const uint8_t *codes, const int8_t *const x[TILE], int64_t at,
                        int tokens) {
    int8x16_t v[TILE];
    for (int t = 0; t < tokens; t++) v[t] = vld1q_s8(x[t] + at);
#define GROUP(g)                                                                             \
    for (int q = 0; q < QUARTERS; q++) {                                                     \
        const int8x16_t w = vld1q_s8((const int8_t *)codes + 64 * (g) + 16 * q);             \
        for (int t = 0; t < tokens; t++) acc[t][q] = vdotq_laneq_s32(acc[t][q], w, v[t], g); \
    }
    GROUP(0)
    GROUP(1)
    GROUP(2)
    GROUP(3)
}

INLINE void clear(int32x4_t acc[TILE][QUARTERS], int tokens) {
    for (int t = 0; t < tokens; t++)
        for (int q = 0; q < QUARTERS; q++) acc[t][q] = vdupq_n_s32(0);
}

INLINE void add_to(float *acc, float32x4_t v, float scale) { vst1q_f32(acc, vfmaq_n_f32(vld1q_f32(acc), v, scale)); }

INLINE void k_tile(const gemm_panel *p, const gemm_token *k, int tokens, int sub, bool minimums) {
    int32x4_t sum[TILE][QUARTERS], acc[TILE][QUARTERS];
    const int8_t *x[TILE];
    for (int t = 0; t < tokens; t++) x[t] = k[t].codes;
    clear(sum, tokens);
    for (int s = 0; s < 256 / sub; s++) {
        clear(acc, tokens);
        for (int c = 0; c < sub; c += 16)
            multiply_16(acc, p->codes + (s * sub + c) * GEMM_ROWS, x, s * sub + c, tokens);
        for (int q = 0; q < QUARTERS; q++) {
            const int32x4_t scale =
                vshrq_n_s32(vreinterpretq_s32_s16(vld1q_s16(p->scales + (s * GEMM_ROWS + 4 * q) * 2)), 16);
            for (int t = 0; t < tokens; t++) sum[t][q] = vmlaq_s32(sum[t][q], acc[t][q], scale);
        }
    }
    for (int q = 0; q < QUARTERS; q++)
        for (int t = 0; t < tokens; t++) {
            float32x4_t y = vmulq_f32(vcvtq_f32_s32(sum[t][q]), vld1q_f32(p->d + 4 * q));
            if (minimums) {
                float32x4_t m = vdupq_n_f32(0.0f);
                for (int s = 0; s < 8; s++) { /* [pair][row][2] */
                    const int16x8_t pair = vld1q_s16(p->mins + (s / 2 * GEMM_ROWS + 4 * q) * 2);
                    const int32x4_t min = s % 2 ? vshrq_n_s32(vreinterpretq_s32_s16(pair), 16)
                                                : vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_s16(pair), 16), 16);
                    m = vfmaq_n_f32(m, vcvtq_f32_s32(min), k[t].sums[s]);
                }
                y = vfmsq_f32(y, m, vld1q_f32(p->m + 4 * q));
            }
            add_to(k[t].acc + 4 * q, y, k[t].scales[0]);
        }
}

INLINE void block_tile(const gemm_panel *p, const gemm_token *k, int tokens, int64_t step, bool minimums) {
    const int8_t *x[TILE];
    for (int t = 0; t < tokens; t++) x[t] = k[t].codes;
    for (int64_t from = 0; from < p->depth; from += step) {
        float32x4_t sum[TILE][QUARTERS];
        for (int t = 0; t < tokens; t++)
            for (int q = 0; q < QUARTERS; q++) sum[t][q] = vdupq_n_f32(0.0f);
        for (int64_t c = from; c < from + step; c += 32) {
            int32x4_t acc[TILE][QUARTERS];
            clear(acc, tokens);
            for (int h = 0; h < 32; h += 16) multiply_16(acc, p->codes + (c + h) * GEMM_ROWS, x, c + h, tokens);
            for (int q = 0; q < QUARTERS; q++) {
                const float32x4_t d = vld1q_f32(p->d + c / 32 * GEMM_ROWS + 4 * q);
                for (int t = 0; t < tokens; t++) {
                    sum[t][q] = vfmaq_f32(sum[t][q], vcvtq_f32_s32(acc[t][q]), d);
                    if (minimums)
                        sum[t][q] =
                            vfmaq_n_f32(sum[t][q], vld1q_f32(p->m + c / 32 * GEMM_ROWS + 4 * q), k[t].sums[c / 32]);
                }
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int q = 0; q < QUARTERS; q++) add_to(k[t].acc + 4 * q, sum[t][q], k[t].scales[from / step]);
    }
}

#define K_MIN_32(t) k_tile(p, k, t, 32, true)
#define K_MIN_16(t) k_tile(p, k, t, 16, true)
#define K_16(t) k_tile(p, k, t, 16, false)
#define BLOCK(t) block_tile(p, k, t, x->step, false)
#define BLOCK_MIN(t) block_tile(p, k, t, x->step, true)
GEMM_MULTIPLY(k_min_32, K_MIN_32, GEMM_CASES_4)
GEMM_MULTIPLY(k_min_16, K_MIN_16, GEMM_CASES_4)
GEMM_MULTIPLY(k_16, K_16, GEMM_CASES_4)
GEMM_MULTIPLY(block, BLOCK, GEMM_CASES_4)
GEMM_MULTIPLY(block_min, BLOCK_MIN, GEMM_CASES_4)

static const gemm_kernel kernels[] = {
    {.format = DG_Q4_K, .k_quant = true, .unpack = unpack_q4_k, .multiply = multiply_k_min_32},
    {.format = DG_Q5_K, .k_quant = true, .unpack = unpack_q5_k, .multiply = multiply_k_min_16},
    {.format = DG_Q6_K, .k_quant = true, .unpack = unpack_q6_k, .multiply = multiply_k_16},
    {.format = DG_Q5_0, .unpack = unpack_q5_0, .multiply = multiply_block},
    {.format = DG_Q5_1, .unpack = unpack_q5_1, .multiply = multiply_block_min},
    {.format = DG_Q4_0, .unpack = unpack_q4_0, .multiply = multiply_block},
    {.format = DG_Q8_0, .unpack = unpack_q8_0, .multiply = multiply_block},
    {.format = DG_IQ4_NL, .unpack = unpack_iq4_nl, .multiply = multiply_block},
    {.format = DG_IQ4_XS, .unpack = unpack_iq4_xs, .multiply = multiply_block},
};

/* ---- Activations; codes are signed here, so accumulators start at nothing ---- */

static void quantise(const gemm_input *x, int64_t b, int64_t i, const float *values) {
    const int64_t row = b * x->n + i;
    for (int64_t from = 0; from < x->depth; from += x->step) {
        float32x4_t peaks = vdupq_n_f32(0.0f);
        for (int64_t c = from; c < from + x->step; c += 4) peaks = vmaxq_f32(peaks, vabsq_f32(vld1q_f32(values + c)));
        const float peak = vmaxvq_f32(peaks), inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
        x->scales[row * (x->depth / x->step) + from / x->step] = peak / 127.0f;
        for (int64_t c = from; c < from + x->step; c += 32) {
            int32_t sum = 0;
            for (int64_t j = c; j < c + 32; j += 8) {
                const int16x8_t eight =
                    vcombine_s16(vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + j), inverse))),
                                 vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + j + 4), inverse))));
                vst1_s8(x->codes + row * x->depth + j, vmovn_s16(eight));
                sum += vaddvq_s16(eight);
            }
            x->sums[row * (x->depth / 32) + c / 32] = (float)sum;
        }
    }
}

void gemm_install_neon(ops *o) {
    static const gemm_set set = GEMM_SET_OF_THIS_FILE;
    gemm_install(o, &set);
}
