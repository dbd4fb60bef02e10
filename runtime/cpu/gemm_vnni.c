/* Integer products with VNNI: four unsigned codes times four signed activations, added to int32 in one instruction.
 * Compiled for AVX-512 (16 rows a vector) and for AVX-VNNI (8 rows a vector, two to a panel).
 *
 * Codes are stored with an offset (32, 16, or 128 for signed ones); accumulators start at minus that times the sum
 * of the activations, so they end as if codes were signed.
 */
#include "gemm.h"

#include "gemm_vocabulary.h"
#include "gemm_unpack_avx2.h"

/* vectors to a panel; tokens that share a load of the codes */
enum { HALVES = GEMM_ROWS / LANES, TILE = LANES == 16 ? 8 : 4 };

#ifdef VECTORS_OF_512
#define CASES GEMM_CASES_8
typedef __m512i vi;
#define LOADI(at) _mm512_load_si512((const void *)(at))
#define SETI(x) _mm512_set1_epi32(x)
#define DOT8(acc, codes, x) _mm512_dpbusd_epi32(acc, codes, x)
#define DOT16(acc, a, b) _mm512_dpwssd_epi32(acc, a, b)
#define SHIFT(v, n) _mm512_slli_epi32(v, n)
#define SHIFT_DOWN(v, n) _mm512_srai_epi32(v, n)
#define TO_FLOAT(v) _mm512_cvtepi32_ps(v)
#else
#define CASES GEMM_CASES_4
typedef __m256i vi;
#define LOADI(at) _mm256_load_si256((const __m256i *)(const void *)(at))
#define SETI(x) _mm256_set1_epi32(x)
#ifdef DG_SIMDE
#define DOT8(acc, codes, x) _mm256_dpbusd_epi32(acc, codes, x)
#define DOT16(acc, a, b) _mm256_dpwssd_epi32(acc, a, b)
#else
#define DOT8(acc, codes, x) _mm256_dpbusd_avx_epi32(acc, codes, x)
#define DOT16(acc, a, b) _mm256_dpwssd_avx_epi32(acc, a, b)
#endif
#define SHIFT(v, n) _mm256_slli_epi32(v, n)
#define SHIFT_DOWN(v, n) _mm256_srai_epi32(v, n)
#define TO_FLOAT(v) _mm256_cvtepi32_ps(v)
#endif

enum { OFFSET_16 = 32, OFFSET_32 = 16, SIGNED_SHIFT = 3 /* 16 << 3 = 128 */ };

INLINE vi broadcast4(const void *at) {
    int32_t four;
    memcpy(&four, at, 4);
    return SETI(four);
}

INLINE void multiply_groups(vi acc[TILE][HALVES], const uint8_t *codes, const int8_t *const x[TILE], int64_t at,
                            int groups, int tokens) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++) {
        vi w[HALVES];
        for (int h = 0; h < HALVES; h++) w[h] = LOADI(codes + 64 * g + 32 * h);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            const vi v = broadcast4(x[t] + at + 4 * g);
            for (int h = 0; h < HALVES; h++) acc[t][h] = DOT8(acc[t][h], w[h], v);
        }
    }
}

INLINE void add_to(float *acc, vf v, vf scale) { vf_store(acc, vf_fma(v, scale, vf_load(acc))); }

/* The integer scales of a K-quant, as they stand in the panel, to float32. */
INLINE vf scale_of(const gemm_panel *p, int s, int h) {
    return TO_FLOAT(SHIFT_DOWN(LOADI(p->scales + (s * GEMM_ROWS + LANES * h) * 2), 16));
}

INLINE void k_tile(const gemm_panel *p, const gemm_token *k, int tokens, int sub, bool offset, bool minimums) {
    vf sum[TILE][HALVES];
    vi acc[TILE][HALVES];
    const int8_t *x[TILE];
    for (int t = 0; t < tokens; t++) {
        x[t] = k[t].codes;
        for (int h = 0; h < HALVES; h++) sum[t][h] = vf_set(0.0f);
    }
    for (int s = 0; s < 256 / sub; s++) {
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < HALVES; h++) acc[t][h] = offset ? SETI(k[t].start16[s]) : SETI(0);
        multiply_groups(acc, p->codes + s * sub * GEMM_ROWS, x, s * sub, sub / 4, tokens);
        for (int h = 0; h < HALVES; h++) {
            const vf scale = scale_of(p, s, h);
            for (int t = 0; t < tokens; t++) sum[t][h] = vf_fma(TO_FLOAT(acc[t][h]), scale, sum[t][h]);
        }
    }
    for (int h = 0; h < HALVES; h++)
        for (int t = 0; t < tokens; t++) {
            vf y = vf_mul(sum[t][h], vf_load(p->d + LANES * h));
            if (minimums) {
                vi m = SETI(0);
                for (int s = 0; s < 4; s++)
                    m = DOT16(m, LOADI(p->mins + (s * GEMM_ROWS + LANES * h) * 2), broadcast4(k[t].sums16 + 2 * s));
                y = vf_fnma(TO_FLOAT(m), vf_load(p->m + LANES * h), y);
            }
            add_to(k[t].acc + LANES * h, y, vf_set(k[t].scales[0]));
        }
}

INLINE void block_tile(const gemm_panel *p, const gemm_token *k, int tokens, int64_t step, bool minimums,
                       bool is_signed) {
    const int8_t *x[TILE];
    vf total[TILE][HALVES];
    for (int t = 0; t < tokens; t++) {
        x[t] = k[t].codes;
        for (int h = 0; h < HALVES; h++) total[t][h] = vf_load(k[t].acc + LANES * h);
    }
    for (int64_t from = 0; from < p->depth; from += step) {
        vf sum[TILE][HALVES];
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < HALVES; h++) sum[t][h] = vf_set(0.0f);
        for (int64_t c = from; c < from + step; c += 32) {
            vi acc[TILE][HALVES];
            for (int t = 0; t < tokens; t++)
                for (int h = 0; h < HALVES; h++)
                    acc[t][h] =
                        is_signed ? SHIFT(SETI(k[t].start32[c / 32]), SIGNED_SHIFT) : SETI(k[t].start32[c / 32]);
            multiply_groups(acc, p->codes + c * GEMM_ROWS, x, c, 8, tokens);
            for (int h = 0; h < HALVES; h++) {
                const vf d = vf_load(p->d + c / 32 * GEMM_ROWS + LANES * h);
                for (int t = 0; t < tokens; t++) {
                    sum[t][h] = vf_fma(TO_FLOAT(acc[t][h]), d, sum[t][h]);
                    if (minimums)
                        sum[t][h] = vf_fma(vf_load(p->m + c / 32 * GEMM_ROWS + LANES * h), vf_set(k[t].sums[c / 32]),
                                           sum[t][h]);
                }
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < HALVES; h++)
                total[t][h] = vf_fma(sum[t][h], vf_set(k[t].scales[from / step]), total[t][h]);
    }
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < HALVES; h++) vf_store(k[t].acc + LANES * h, total[t][h]);
}

#define K_Q4(t) k_tile(p, k, t, 32, false, true)
#define K_Q6(t) k_tile(p, k, t, 16, true, false)
#define BLOCK(t) block_tile(p, k, t, x->step, false, false)
#define BLOCK_MIN(t) block_tile(p, k, t, x->step, true, false)
#define SIGNED(t) block_tile(p, k, t, x->step, false, true)
GEMM_MULTIPLY(k_min, K_Q4, CASES)
GEMM_MULTIPLY(k_offset, K_Q6, CASES)
GEMM_MULTIPLY(block, BLOCK, CASES)
GEMM_MULTIPLY(block_min, BLOCK_MIN, CASES)
GEMM_MULTIPLY(signed, SIGNED, CASES)

static inline void put_signed(gemm_panel *p, int h, int64_t g, __m256i codes) {
    put(p->codes + g * 64 + 32 * h, _mm256_xor_si256(codes, bytes(-128)));
}

UNPACK_ALL(32)

static const gemm_kernel kernels[] = {
    KERNEL(Q4_K, true, false, q4_k, k_min),       KERNEL(Q5_K, true, false, q5_k, k_min),
    KERNEL(Q6_K, true, false, q6_k, k_offset),    KERNEL(Q5_0, false, false, q5_0, block),
    KERNEL(Q5_1, false, false, q5_1, block_min),  KERNEL(Q4_0, false, false, q4_0, block),
    KERNEL(Q8_0, false, false, q8_0, signed),     KERNEL(IQ4_NL, false, false, iq4_nl, signed),
    KERNEL(IQ4_XS, false, false, iq4_xs, signed),
};

static inline void put_starts(__m256i pairs, int32_t *start16, int32_t *start32) {
    const __m256i totals = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const int first = _mm256_extract_epi32(totals, 0), second = _mm256_extract_epi32(totals, 4);
    start16[0] = -OFFSET_16 * first;
    start16[1] = -OFFSET_16 * second;
    *start32 = -OFFSET_32 * (first + second);
}

#include "gemm_quantise_avx2.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(gemm_install_, ISA)(ops *o) {
    static const gemm_set set = GEMM_SET_OF_THIS_FILE;
    gemm_install(o, &set);
}
