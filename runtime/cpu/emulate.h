/* Instructions that the compiling machine lacks, one by one in plain C: SIMDe's forms under the processor's own
 * names, so that a test can prove code for them (make test-emulated). Included before any other intrinsics.
 */
#ifndef DG_EMULATE_H
#define DG_EMULATE_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <immintrin.h>
#include <string.h>

#ifdef DG_SIMDE_512
/* What SIMDe 0.7.4 does not have yet, lane by lane. */
#define LANE_BY_LANE(from, v, lane) \
    from in[16];                    \
    memcpy(in, &(v), sizeof in);    \
    for (int i = 0; i < 16; i++) out[i] = lane

static inline simde__m512 emulated_to_float(simde__m512i v) {
    float out[16];
    LANE_BY_LANE(int32_t, v, (float)in[i]);
    return simde_mm512_loadu_ps(out);
}

static inline simde__m512 emulated_from_halves(__m256i v) {
    float out[16];
    LANE_BY_LANE(uint16_t, v, _cvtsh_ss(in[i]));
    return simde_mm512_loadu_ps(out);
}

static inline simde__m512i emulated_shift_down(simde__m512i v, int count) {
    int32_t out[16];
    LANE_BY_LANE(int32_t, v, in[i] >> count);
    return simde_mm512_loadu_si512(out);
}

static inline simde__m512 emulated_load(__mmask16 mask, const float *p) {
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = mask >> i & 1 ? p[i] : 0.0f;
    return simde_mm512_loadu_ps(out);
}

static inline void emulated_store(float *p, __mmask16 mask, simde__m512 v) {
    float in[16];
    simde_mm512_storeu_ps(in, v);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) p[i] = in[i];
}

#define _mm512_cvtepi32_ps(v) emulated_to_float(v)
#define _mm512_srai_epi32(v, count) emulated_shift_down(v, count)
#define _mm512_cvtph_ps(v) emulated_from_halves(v)
#define _mm512_maskz_loadu_ps(mask, p) emulated_load(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) emulated_store(p, mask, v)
#endif

#endif
