/* The functions that a forward pass needs, LANES at a time, to one or two units in the last place. */
#ifndef DG_SIMD_MATH_H
#define DG_SIMD_MATH_H

#include "simd.h"

/* e^x: x = n ln2 + r, |r| <= ln2 / 2, Taylor to r^7, times 2^n. Below -87.3: 0; above 88: e^88. */
VF vf vf_exp(vf x) {
    const vf low = vf_set(-87.3f);
    const vmask none = vf_less(x, low);
    x = vf_min(vf_max(x, low), vf_set(88.0f));
    const vf n = vf_round(vf_mul(x, vf_set(1.44269504f)));
    vf r = vf_fnma(n, vf_set(0.693359375f), x);
    r = vf_fnma(n, vf_set(-2.12194440e-4f), r);
    vf p = vf_set(1.0f / 5040.0f);
    p = vf_fma(p, r, vf_set(1.0f / 720.0f));
    p = vf_fma(p, r, vf_set(1.0f / 120.0f));
    p = vf_fma(p, r, vf_set(1.0f / 24.0f));
    p = vf_fma(p, r, vf_set(1.0f / 6.0f));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_select(none, vf_set(0.0f), vf_mul(p, vf_pow2(n)));
}

/* gelu, tanh form: x (1 + tanh t) / 2 = x / (1 + e^(-2t)), which loses nothing where tanh nears -1. */
VF vf vf_gelu(vf x) {
    const vf one = vf_set(1.0f);
    const vf cubic = vf_fma(vf_mul(x, x), vf_set(0.044715f), one);
    const vf t2 = vf_mul(vf_mul(x, cubic), vf_set(-2.0f * 0.79788456f));
    return vf_div(x, vf_add(one, vf_exp(t2)));
}

/* tanh: near 0 an odd series, elsewhere sign(x) (1 - 2 / (e^(2|x|) + 1)). */
VF vf vf_tanh(vf x) {
    const vf one = vf_set(1.0f), a = vf_abs(x), square = vf_mul(a, a);
    vf series = vf_set(62.0f / 2835.0f);
    series = vf_fma(series, square, vf_set(-17.0f / 315.0f));
    series = vf_fma(series, square, vf_set(2.0f / 15.0f));
    series = vf_fma(series, square, vf_set(-1.0f / 3.0f));
    series = vf_fma(vf_mul(series, square), a, a);
    const vf far = vf_sub(one, vf_div(vf_set(2.0f), vf_add(vf_exp(vf_add(a, a)), one)));
    return vf_copysign(vf_select(vf_less(a, vf_set(0.25f)), series, far), x);
}

/* Sine and cosine of |x| < 2^20: x = n pi/2 + r with pi/2 in three parts, of which the first leaves no error, then
 * Taylor. */
VF void vf_sincos(vf x, vf *sine, vf *cosine) {
    const vf n = vf_round(vf_mul(x, vf_set(0.636619772f))), one = vf_set(1.0f), zero = vf_set(0.0f);
    vf r = vf_fnma(n, vf_set(1.57079637f), x);
    r = vf_fnma(n, vf_set(-4.37113883e-8f), r);
    r = vf_fnma(n, vf_set(-1.71512451e-15f), r);
    const vf square = vf_mul(r, r);
    vf s = vf_set(1.0f / 362880.0f);
    s = vf_fma(s, square, vf_set(-1.0f / 5040.0f));
    s = vf_fma(s, square, vf_set(1.0f / 120.0f));
    s = vf_fma(s, square, vf_set(-1.0f / 6.0f));
    s = vf_fma(vf_mul(s, square), r, r);
    vf c = vf_set(-1.0f / 3628800.0f);
    c = vf_fma(c, square, vf_set(1.0f / 40320.0f));
    c = vf_fma(c, square, vf_set(-1.0f / 720.0f));
    c = vf_fma(c, square, vf_set(1.0f / 24.0f));
    c = vf_fma(c, square, vf_set(-0.5f));
    c = vf_fma(c, square, one);
    /* -2 .. 2 quarters */
    const vf turn = vf_fnma(vf_round(vf_mul(n, vf_set(0.25f))), vf_set(4.0f), n), size = vf_abs(turn);
    const vmask odd = vf_less(vf_abs(vf_sub(size, one)), vf_set(0.5f)), opposite = vf_less(one, size);
    const vf sines = vf_select(odd, c, s), cosines = vf_select(odd, s, c);
    const vf sign_s = vf_select(opposite, vf_set(-1.0f), vf_select(vf_less(turn, zero), vf_set(-1.0f), one));
    const vf sign_c = vf_select(opposite, vf_set(-1.0f), vf_select(vf_less(zero, turn), vf_set(-1.0f), one));
    *sine = vf_mul(sines, sign_s);
    *cosine = vf_mul(cosines, sign_c);
}

#endif
