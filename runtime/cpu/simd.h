/* Vectors of LANES float32, with the same names for every instruction set. The compiler's flags choose the set. Only
 * files that are compiled once for each set include this. */
#ifndef DG_SIMD_H
#define DG_SIMD_H

#include <math.h>
#include <stdint.h>

#define VF static inline __attribute__((always_inline))

/* a * b + c is vf_fma(a, b, c), c - a * b is vf_fnma(a, b, c), both rounded once. The `first` forms take the lanes
 * below n, of which there may be none or more than LANES; loading makes the others 0. vf_pow2 is 2^n of integral
 * n in [-126, 127]. vf_transpose swaps rows and columns of LANES vectors. vf_min(a, b) and vf_max(a, b) are b where a
 * alone is a NaN. */

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#ifdef DG_SIMDE
#include "emulate.h"
#endif
#include <immintrin.h>

#if defined(__AVX512F__) || defined(DG_SIMDE_512)
#define VECTORS_OF_512
#endif

#ifdef VECTORS_OF_512
typedef __m512 vf;
typedef __mmask16 vmask;
enum { LANES = 16, REGISTERS = 32 };
#define MM(operation) _mm512_##operation
#else
typedef __m256 vf;
typedef __m256 vmask;
enum { LANES = 8, REGISTERS = 16 };
#define MM(operation) _mm256_##operation
#endif

VF vf vf_set(float x) { return MM(set1_ps)(x); }
VF vf vf_load(const float *p) { return MM(loadu_ps)(p); }
VF void vf_store(float *p, vf v) { MM(storeu_ps)(p, v); }
VF vf vf_add(vf a, vf b) { return MM(add_ps)(a, b); }
VF vf vf_sub(vf a, vf b) { return MM(sub_ps)(a, b); }
VF vf vf_mul(vf a, vf b) { return MM(mul_ps)(a, b); }
VF vf vf_div(vf a, vf b) { return MM(div_ps)(a, b); }
VF vf vf_fma(vf a, vf b, vf c) { return MM(fmadd_ps)(a, b, c); }
VF vf vf_fnma(vf a, vf b, vf c) { return MM(fnmadd_ps)(a, b, c); }
VF vf vf_min(vf a, vf b) { return MM(min_ps)(a, b); }
VF vf vf_max(vf a, vf b) { return MM(max_ps)(a, b); }
VF vf vf_abs(vf a) { return MM(andnot_ps)(vf_set(-0.0f), a); }
VF vf vf_copysign(vf size, vf sign) { return MM(or_ps)(vf_abs(size), MM(and_ps)(sign, vf_set(-0.0f))); }
#undef MM

#ifdef VECTORS_OF_512
VF vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VF vf vf_pow2(vf n) { return _mm512_scalef_ps(vf_set(1.0f), n); }
VF vmask vf_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VF vf vf_select(vmask m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
VF vmask vf_first(int64_t n) { return (vmask)(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }
VF vf vf_load_first(const float *p, int64_t n) {
    return n >= LANES ? vf_load(p) : _mm512_maskz_loadu_ps(vf_first(n), p);
}
VF void vf_store_first(float *p, vf v, int64_t n) {
    if (n >= LANES) vf_store(p, v);
    else _mm512_mask_storeu_ps(p, vf_first(n), v);
}

VF void vf_transpose(vf *v) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2)
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 16; i += 4) { /* b[i + j], quarter q: column 4 q + j of rows i .. i + 3 */
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44), b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
        const __m512 even_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88),
                     odd_low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88),
                     odd_high = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88),
        v[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        v[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88),
              v[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}
#else
VF vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VF vf vf_pow2(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
VF vmask vf_less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
VF vf vf_select(vmask m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
VF vmask vf_first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < 8 ? n : 8)), lane));
}
VF vf vf_load_first(const float *p, int64_t n) {
    return n >= LANES ? vf_load(p) : _mm256_maskload_ps(p, _mm256_castps_si256(vf_first(n)));
}
VF void vf_store_first(float *p, vf v, int64_t n) {
    if (n >= LANES) vf_store(p, v);
    else _mm256_maskstore_ps(p, _mm256_castps_si256(vf_first(n)), v);
}

VF void vf_transpose(vf *v) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2)
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4) { /* b[i + j], half q: column 4 q + j of rows i .. i + 3 */
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44), b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++)
        v[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20), v[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
}
#endif

#elif defined(__aarch64__)
#include <arm_neon.h>

typedef float32x4_t vf;
typedef uint32x4_t vmask;
enum { LANES = 4, REGISTERS = 32 };

VF vf vf_set(float x) { return vdupq_n_f32(x); }
VF vf vf_load(const float *p) { return vld1q_f32(p); }
VF void vf_store(float *p, vf v) { vst1q_f32(p, v); }
VF vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
VF vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
VF vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
VF vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
VF vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
VF vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
VF vf vf_min(vf a, vf b) { return vminnmq_f32(a, b); }
VF vf vf_max(vf a, vf b) { return vmaxnmq_f32(a, b); }
VF vf vf_abs(vf a) { return vabsq_f32(a); }
VF vf vf_copysign(vf size, vf sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size); }
VF vf vf_round(vf a) { return vrndnq_f32(a); }
VF vf vf_pow2(vf n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }
VF vmask vf_less(vf a, vf b) { return vcltq_f32(a, b); }
VF vf vf_select(vmask m, vf yes, vf no) { return vbslq_f32(m, yes, no); }
VF vmask vf_first(int64_t n) {
    static const int32_t lane[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(lane), vdupq_n_s32((int32_t)(n < 4 ? n : 4)));
}
VF vf vf_load_first(const float *p, int64_t n) {
    if (n >= 4) return vld1q_f32(p);
    float lane[4] = {0};
    for (int64_t i = 0; i < n; i++) lane[i] = p[i];
    return vld1q_f32(lane);
}
VF void vf_store_first(float *p, vf v, int64_t n) {
    float lane[4];
    vst1q_f32(n >= 4 ? p : lane, v);
    for (int64_t i = 0; i < n && n < 4; i++) p[i] = lane[i];
}

VF void vf_transpose(vf *v) {
    const float32x4_t a = vzip1q_f32(v[0], v[2]), b = vzip2q_f32(v[0], v[2]), c = vzip1q_f32(v[1], v[3]),
                      d = vzip2q_f32(v[1], v[3]);
    v[0] = vzip1q_f32(a, c);
    v[1] = vzip2q_f32(a, c);
    v[2] = vzip1q_f32(b, d);
    v[3] = vzip2q_f32(b, d);
}

#else
#error "no instruction set of isa.def"
#endif

/* The sum and the largest of the lanes, in an order that is the same for every set of as many lanes. */
VF float vf_sum(vf v) {
    float lane[LANES];
    vf_store(lane, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

VF float vf_largest(vf v) {
    float lane[LANES];
    vf_store(lane, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    return lane[0];
}

/* The largest of z[n]. */
static inline float largest_of(const float *z, int64_t n) {
    vf best = vf_set(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) best = vf_max(vf_load(z + i), best);
    float peak = vf_largest(best);
    for (; i < n; i++) peak = z[i] > peak ? z[i] : peak;
    return peak;
}

/* 0, or NaN where x holds NaN or infinity: 0 times either is NaN. */
static inline float nothing_of(const float *x, int64_t n) {
    enum { SUMS = 4 };
    const vf zero = vf_set(0.0f);
    vf sum[SUMS] = {zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) sum[s] = vf_fma(vf_load(x + i + s * LANES), zero, sum[s]);
    for (; i < n; i += LANES) sum[0] = vf_fma(vf_load_first(x + i, n - i), zero, sum[0]);
    return vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3]))) * 0.0f;
}

#endif
