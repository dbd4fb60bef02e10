/* Vector forms of the functions that a forward pass needs, 8 float32 at a time. Included by AVX2 code alone. */
#ifndef DG_AVX2_MATH_H
#define DG_AVX2_MATH_H

#include <immintrin.h>

/* e^x to 1 ulp or two: x = n ln2 + r, |r| <= ln2 / 2, Taylor to r^7, times 2^n. Below -87.3: 0; above 88: e^88. */
static inline __m256 exp8(__m256 x) {
    const __m256 low = _mm256_set1_ps(-87.3f);
    const __m256 none = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    x = _mm256_min_ps(_mm256_max_ps(x, low), _mm256_set1_ps(88.0f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040.0f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(none, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

/* gelu, tanh form: x (1 + tanh t) / 2 = x / (1 + e^(-2t)), which loses nothing where tanh nears -1. */
static inline __m256 gelu8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), one);
    const __m256 t2 = _mm256_mul_ps(_mm256_mul_ps(x, cubic), _mm256_set1_ps(-2.0f * 0.79788456f));
    return _mm256_div_ps(x, _mm256_add_ps(one, exp8(t2)));
}

/* tanh: near 0 an odd series, elsewhere sign(x) (1 - 2 / (e^(2|x|) + 1)). */
static inline __m256 tanh8(__m256 x) {
    const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), one = _mm256_set1_ps(1.0f);
    const __m256 a = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), square = _mm256_mul_ps(a, a);
    __m256 series = _mm256_set1_ps(62.0f / 2835.0f);
    series = _mm256_fmadd_ps(series, square, _mm256_set1_ps(-17.0f / 315.0f));
    series = _mm256_fmadd_ps(series, square, _mm256_set1_ps(2.0f / 15.0f));
    series = _mm256_fmadd_ps(series, square, _mm256_set1_ps(-1.0f / 3.0f));
    series = _mm256_fmadd_ps(_mm256_mul_ps(series, square), a, a);
    const __m256 e = exp8(_mm256_add_ps(a, a));
    const __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
    const __m256 near = _mm256_cmp_ps(a, _mm256_set1_ps(0.25f), _CMP_LT_OQ);
    return _mm256_or_ps(_mm256_blendv_ps(far, series, near), sign);
}

/* The sums of four vectors, in order. */
static inline __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

static inline float sum8(__m256 a) {
    return _mm_cvtss_f32(sum4(a, _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()));
}

/* Lanes below n, as a load and store mask. */
static inline __m256i first_lanes(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < 8 ? n : 8)), lane);
}

#endif
