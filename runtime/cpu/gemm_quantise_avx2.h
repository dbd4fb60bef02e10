/* Rounds activations to 8 or 13 bits with AVX2. The file that includes this defines
 * put_starts(pairs, start16, start32): the start of accumulators, from the sums over 16 columns (of columns 4g, 4g + 1
 * in the lower and of 4g + 2, 4g + 3 in the upper 16 bits of every 32, one half of the vector per 16 columns).
 */
#ifndef DG_GEMM_QUANTISE_AVX2_H
#define DG_GEMM_QUANTISE_AVX2_H

#include <math.h>

static void quantise(const gemm_input *x, int64_t b, int64_t i, const float *values) {
    const int64_t row = b * x->n + i;
    const float most = x->wide ? 4064.0f : 127.0f; /* 32 * 127: what 8 bits hold exactly, 13 do too */
    for (int64_t from = 0; from < x->depth; from += x->step) {
        __m256 peaks = _mm256_setzero_ps();
        __m256i endless = _mm256_setzero_si256(); /* NaN or infinity: as integers, beyond the largest float */
        for (int64_t c = from; c < from + x->step; c += 8) {
            const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(values + c));
            peaks = _mm256_max_ps(size, peaks);
            endless =
                _mm256_or_si256(endless, _mm256_cmpgt_epi32(_mm256_castps_si256(size), _mm256_set1_epi32(0x7f7fffff)));
        }
        float lanes[8], peak = 0.0f;
        _mm256_storeu_ps(lanes, peaks);
        for (int l = 0; l < 8; l++) peak = lanes[l] > peak ? lanes[l] : peak;
        if (!_mm256_testz_si256(endless, endless)) peak = NAN;
        const float inverse = peak > 0.0f ? most / peak : 0.0f;
        x->scales[row * (x->depth / x->step) + from / x->step] = peak / most;
        for (int64_t c = from; c < from + x->step; c += 32) {
            __m256i v[4];
            for (int q = 0; q < 4; q++)
                v[q] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + c + 8 * q), _mm256_set1_ps(inverse)));
            const __m256i low = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
            const __m256i high = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[2], v[3]), 0xd8);
            const int64_t at = row * (x->depth / 32) + c / 32;
            if (x->wide) {
                int16_t *codes = (int16_t *)(void *)x->codes + row * x->depth + c;
                _mm256_storeu_si256((__m256i *)(void *)codes, low);
                _mm256_storeu_si256((__m256i *)(void *)(codes + 16), high);
            } else {
                const __m256i codes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
                _mm256_storeu_si256((__m256i *)(void *)(x->codes + row * x->depth + c), codes);
                __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
                pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0x4e));
                pairs = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
                put_starts(pairs, x->start16 + 2 * at, x->start32 + at);
                const __m256i totals = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                const int sum = _mm256_extract_epi32(totals, 0) + _mm256_extract_epi32(totals, 4);
                x->sums16[at] = (int16_t)sum;
                x->sums[at] = (float)sum;
            }
        }
    }
}

#endif
