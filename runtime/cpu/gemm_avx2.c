/* Integer products on AVX2: unsigned codes times signed activations are summed in int16 over as many columns as the
 * size of the codes allows; the multiplication by the scale then widens the sums to int32.
 *
 * int16 sums wrap, so only a sub-block's final sum must fit. With codes up to 15 or centred on an offset of 16, 32
 * columns do (16 products of at most 16 * 127 per lane); with an offset of 32, or codes up to 31, 16 columns do.
 */
#include "gemm.h"

#include <immintrin.h>

#include "gemm_unpack_avx2.h"
#include "gemm_vocabulary.h"

/* Codes stored with an offset: sums over 16 columns start at -32 times the activations', those over 32 at -16 times. */
enum { OFFSET_16 = 32, OFFSET_32 = 16 };

enum { TILE = 4, HALVES = 2 }; /* tokens that share a load of the codes; vectors of 8 rows in a panel */

/* Keeps the compiler from hoisting products out of the chain of additions, which would spill every accumulator. */
#define KEEP(v) __asm__("" : "+x"(v))

INLINE __m256i load(const void *at) { return _mm256_load_si256(at); }

INLINE __m256i broadcast4(const void *at) {
    int32_t four;
    memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

/* acc[t][h] += codes . x[t] over 4 * groups columns, in int16 */
INLINE void multiply_groups(__m256i acc[TILE][HALVES], const uint8_t *codes, const int8_t *const x[TILE], int64_t at,
                            int groups, int tokens) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++) {
        const __m256i w0 = load(codes + 64 * g), w1 = load(codes + 64 * g + 32);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const __m256i v = broadcast4(x[t] + at + 4 * g);
            acc[t][0] = _mm256_add_epi16(acc[t][0], _mm256_maddubs_epi16(w0, v));
            KEEP(acc[t][0]);
            acc[t][1] = _mm256_add_epi16(acc[t][1], _mm256_maddubs_epi16(w1, v));
            KEEP(acc[t][1]);
        }
    }
}

INLINE void add_to(float *acc, __m256 v) { _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc), v)); }

/* ---- K-quants: integer scales per `sub` (16 or 32) columns, one float32 per 256 ---- */

INLINE void k_tile(const gemm_panel *p, const gemm_token *k, int tokens, int sub, bool offset, bool minimums) {
    __m256i sum[TILE][HALVES], acc[TILE][HALVES];
    const int8_t *x[TILE];
    for (int t = 0; t < tokens; t++) {
        x[t] = k[t].codes;
        for (int h = 0; h < HALVES; h++) sum[t][h] = _mm256_setzero_si256();
    }
    for (int s = 0; s < 256 / sub; s++) {
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < HALVES; h++)
                acc[t][h] = offset ? _mm256_set1_epi32(k[t].start16[s]) : _mm256_setzero_si256();
        multiply_groups(acc, p->codes + s * sub * GEMM_ROWS, x, s * sub, sub / 4, tokens);
        for (int h = 0; h < HALVES; h++) {
            const __m256i scale = load(p->scales + (s * GEMM_ROWS + 8 * h) * 2);
            for (int t = 0; t < tokens; t++)
                sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(acc[t][h], scale));
        }
    }
    for (int h = 0; h < HALVES; h++) {
        const __m256 d = _mm256_load_ps(p->d + 8 * h);
        for (int t = 0; t < tokens; t++) {
            __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[t][h]), d);
            if (minimums) {
                __m256i m = _mm256_setzero_si256();
                for (int s = 0; s < 4; s++)
                    m = _mm256_add_epi32(m, _mm256_madd_epi16(load(p->mins + (s * GEMM_ROWS + 8 * h) * 2),
                                                              broadcast4(k[t].sums16 + 2 * s)));
                y = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(m), _mm256_load_ps(p->m + 8 * h), y);
            }
            add_to(k[t].acc + 8 * h, _mm256_mul_ps(y, _mm256_set1_ps(k[t].scales[0])));
        }
    }
}

/* ---- Blocks of 32 with a float32 scale each ---- */

INLINE void block_tile(const gemm_panel *p, const gemm_token *k, int tokens, int64_t step, bool minimums, bool wide) {
    __m256 block[TILE][HALVES];
    const int8_t *x[TILE];
    for (int t = 0; t < tokens; t++) x[t] = k[t].codes;
    for (int64_t from = 0; from < p->depth; from += step) {
        for (int t = 0; t < tokens; t++) block[t][0] = block[t][1] = _mm256_setzero_ps();
        for (int64_t c = from; c < from + step; c += 32) {
            __m256i acc[TILE][HALVES];
            if (wide) {
                for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
                for (int g = 0; g < 16; g++) {
                    const uint8_t *codes = p->codes + (c / 2 + g) * 64;
                    const __m256i w0 = load(codes), w1 = load(codes + 32);
#pragma GCC unroll 4
                    for (int t = 0; t < tokens; t++) {
                        const __m256i v = broadcast4(x[t] + 2 * c + 4 * g);
                        acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(w0, v));
                        KEEP(acc[t][0]);
                        acc[t][1] = _mm256_add_epi32(acc[t][1], _mm256_madd_epi16(w1, v));
                        KEEP(acc[t][1]);
                    }
                }
            } else {
                for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm256_set1_epi32(k[t].start32[c / 32]);
                multiply_groups(acc, p->codes + c * GEMM_ROWS, x, c, 8, tokens);
            }
            for (int h = 0; h < HALVES; h++) {
                const __m256 d = _mm256_load_ps(p->d + c / 32 * GEMM_ROWS + 8 * h);
                for (int t = 0; t < tokens; t++) {
                    const __m256i sum = wide ? acc[t][h] : _mm256_madd_epi16(acc[t][h], _mm256_set1_epi16(1));
                    block[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, block[t][h]);
                    if (minimums)
                        block[t][h] = _mm256_fmadd_ps(_mm256_load_ps(p->m + c / 32 * GEMM_ROWS + 8 * h),
                                                      _mm256_set1_ps(k[t].sums[c / 32]), block[t][h]);
                }
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < HALVES; h++)
                add_to(k[t].acc + 8 * h, _mm256_mul_ps(block[t][h], _mm256_set1_ps(k[t].scales[from / step])));
    }
}

/* ---- One pair of functions per format ---- */

#define K_Q4(t) k_tile(p, k, t, 32, false, true)
#define K_Q5(t) k_tile(p, k, t, 16, false, true)
#define K_Q6(t) k_tile(p, k, t, 16, true, false)
#define BLOCK(t) block_tile(p, k, t, x->step, false, false)
#define BLOCK_MIN(t) block_tile(p, k, t, x->step, true, false)
#define WIDE(t) block_tile(p, k, t, x->step, false, true)
GEMM_MULTIPLY(q4_k, K_Q4, GEMM_CASES_4)
GEMM_MULTIPLY(q5_k, K_Q5, GEMM_CASES_4)
GEMM_MULTIPLY(q6_k, K_Q6, GEMM_CASES_4)
GEMM_MULTIPLY(block, BLOCK, GEMM_CASES_4)
GEMM_MULTIPLY(block_min, BLOCK_MIN, GEMM_CASES_4)
GEMM_MULTIPLY(wide, WIDE, GEMM_CASES_4)

/* Signed codes of 8 bits become int16: group g of 4 columns, two vectors of column pairs. */
static inline void put_signed(gemm_panel *p, int h, int64_t g, __m256i codes) {
    const __m256i lanes =
        _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
    /* into the upper bytes, shifted down with their sign */
    const __m256i pair = _mm256_add_epi8(_mm256_set1_epi32(0x01800080), lanes);
    put(p->codes + 2 * g * 64 + 32 * h, _mm256_srai_epi16(_mm256_shuffle_epi8(codes, pair), 8));
    put(p->codes + (2 * g + 1) * 64 + 32 * h,
        _mm256_srai_epi16(_mm256_shuffle_epi8(codes, _mm256_add_epi8(pair, _mm256_set1_epi32(0x02000200))), 8));
}

UNPACK_ALL(16)

static const gemm_kernel kernels[] = {
    KERNEL(Q4_K, true, false, q4_k, q4_k),       KERNEL(Q5_K, true, false, q5_k, q5_k),
    KERNEL(Q6_K, true, false, q6_k, q6_k),       KERNEL(Q5_0, false, false, q5_0, block),
    KERNEL(Q5_1, false, false, q5_1, block_min), KERNEL(Q4_0, false, false, q4_0, block),
    KERNEL(Q8_0, false, true, q8_0, wide),       KERNEL(IQ4_NL, false, true, iq4_nl, wide),
    KERNEL(IQ4_XS, false, true, iq4_xs, wide),
};

/* ---- Activations ---- */

static inline void put_starts(__m256i pairs, int32_t *start16, int32_t *start32) {
    const __m256i sixteen = _mm256_mullo_epi16(pairs, _mm256_set1_epi16(-OFFSET_16));
    const __m128i both = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    start16[0] = _mm256_extract_epi32(sixteen, 0);
    start16[1] = _mm256_extract_epi32(sixteen, 4);
    *start32 = _mm_cvtsi128_si32(_mm_mullo_epi16(both, _mm_set1_epi16(-OFFSET_32)));
}

#include "gemm_quantise_avx2.h"
void gemm_install_avx2(ops *o) {
    static const gemm_set set = GEMM_SET_OF_THIS_FILE;
    gemm_install(o, &set);
}
