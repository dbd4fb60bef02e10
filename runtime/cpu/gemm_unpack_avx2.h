/* Blocks as files have them, or repacked -> panels, with AVX2. Packed codes are transposed before they are split, so
 * that a shuffle moves two codes at a time. The layout serves every x86 instruction set.
 *
 * Repacked, the blocks of 8 rows are interleaved word by word (the scales in front or behind as halves): what lies
 * at a row's byte `at` begins at byte 8 * at, for all 8 rows, already transposed. One code reads both.
 */
#ifndef DG_GEMM_UNPACK_AVX2_H
#define DG_GEMM_UNPACK_AVX2_H

#include <immintrin.h>
#include <stddef.h>

#include "every_format.h"
#include "gemm.h"

/* Where 8 rows' blocks lie: rows[0 .. 8), or repacked rows[0] alone. */
typedef struct panel_rows {
    const uint8_t *const *rows;
    bool repacked;
} panel_rows;

/* ---- Shuffles ---- */

static inline void transpose8(const __m256i r[8], __m256i out[8]) { /* 8 x 8 of 32 bits: out[g] lane i = r[i] lane g */
    __m256i t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
        out[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
    }
}

INLINE void words_of(panel_rows from, int64_t at, int count, __m256i *out) { /* of repacked rows, as they are */
    for (int g = 0; g < count; g++)
        out[g] = _mm256_loadu_si256((const __m256i *)(const void *)(from.rows[0] + 8 * at + 32 * g));
}

/* 32 bytes of each of 8 rows, transposed: out[g] has bytes 4g .. 4g + 3 of every row. */
INLINE void columns32(panel_rows from, int64_t at, __m256i out[8]) {
    __m256i r[8];
    if (from.repacked) {
        words_of(from, at, 8, out);
        return;
    }
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i *)(const void *)(from.rows[i] + at));
    transpose8(r, out);
}

/* 16 bytes of each of 8 rows, transposed. */
INLINE void columns16(panel_rows from, int64_t at, __m256i out[4]) {
    __m256i r[4], t[4];
    if (from.repacked) {
        words_of(from, at, 4, out);
        return;
    }
    for (int i = 0; i < 4; i++)
        r[i] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(from.rows[i] + at))),
            _mm_loadu_si128((const __m128i *)(const void *)(from.rows[i + 4] + at)), 1);
    t[0] = _mm256_unpacklo_epi32(r[0], r[1]);
    t[1] = _mm256_unpackhi_epi32(r[0], r[1]);
    t[2] = _mm256_unpacklo_epi32(r[2], r[3]);
    t[3] = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi64(t[0], t[2]);
    out[1] = _mm256_unpackhi_epi64(t[0], t[2]);
    out[2] = _mm256_unpacklo_epi64(t[1], t[3]);
    out[3] = _mm256_unpackhi_epi64(t[1], t[3]);
}

INLINE __m256i word_of(panel_rows from, int64_t at) { /* 4 bytes of each of 8 rows */
    __m256i word;
    int32_t v[8];
    if (from.repacked) {
        words_of(from, at, 1, &word);
        return word;
    }
    for (int i = 0; i < 8; i++) memcpy(&v[i], from.rows[i] + at, 4);
    return _mm256_setr_epi32(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
}

INLINE __m128i half_of(panel_rows from, int64_t at) { /* 2 bytes of each of 8 rows */
    uint16_t v[8];
    if (from.repacked) return _mm_loadu_si128((const __m128i *)(const void *)(from.rows[0] + 8 * at));
    for (int i = 0; i < 8; i++) memcpy(&v[i], from.rows[i] + at, 2);
    return _mm_setr_epi16((short)v[0], (short)v[1], (short)v[2], (short)v[3], (short)v[4], (short)v[5], (short)v[6],
                          (short)v[7]);
}

INLINE __m256 lower_halves(__m256i words) { /* of 8 words, as floats */
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xd8)));
}

/* a half of each of 8 rows */
INLINE __m256 floats_of(panel_rows from, int64_t at) { return _mm256_cvtph_ps(half_of(from, at)); }

static inline __m256i bytes(int v) { return _mm256_set1_epi8((char)v); }
static inline __m256i low4(__m256i v) { return _mm256_and_si256(v, bytes(15)); }
static inline __m256i high4(__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), bytes(15)); }
static inline void put(void *at, __m256i v) { _mm256_store_si256((__m256i *)at, v); }

/* Byte j of every 32-bit lane, unsigned, as two equal int16; or signed. */
static inline __m256i twice(__m256i v, int j) {
    return _mm256_shuffle_epi8(v, _mm256_add_epi8(_mm256_set1_epi32((int)0x80008000 | j << 16 | j),
                                                  _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0,
                                                                    0x00040004, 0x00080008, 0x000c000c)));
}
static inline __m256i twice_signed(__m256i v, int j) { return _mm256_srai_epi16(_mm256_slli_epi16(twice(v, j), 8), 8); }
/* Bytes j and j + 1 of every lane, unsigned, as two int16. */
static inline __m256i two(__m256i v, int j) {
    return _mm256_shuffle_epi8(v, _mm256_add_epi8(_mm256_set1_epi32((int)0x80008000 | (j + 1) << 16 | j),
                                                  _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0,
                                                                    0x00040004, 0x00080008, 0x000c000c)));
}

/* ---- K-quants; h is the half of the panel, 8 rows of it ---- */

/* Q4_K and Q5_K begin alike: d, dmin and the packed scales, 16 bytes. sub: scales are repeated for 32 / sub
 * stretches. */
INLINE void k_head(gemm_panel *p, int h, panel_rows from, int64_t at, int sub) {
    __m256i head[4];
    columns16(from, at, head);
    const __m256i d = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_and_si256(head[0], _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(head[0], 16)),
        0xd8);
    _mm256_store_ps(p->d + 8 * h, _mm256_cvtph_ps(_mm256_castsi256_si128(d)));
    _mm256_store_ps(p->m + 8 * h, _mm256_cvtph_ps(_mm256_extracti128_si256(d, 1)));
    const __m256i six = bytes(63), top = bytes(0x30);
    const __m256i scale[2] = {_mm256_and_si256(head[1], six),
                              _mm256_or_si256(low4(head[3]), _mm256_and_si256(_mm256_srli_epi16(head[1], 2), top))};
    const __m256i min[2] = {_mm256_and_si256(head[2], six),
                            _mm256_or_si256(high4(head[3]), _mm256_and_si256(_mm256_srli_epi16(head[2], 2), top))};
    for (int s = 0; s < 8; s++)
        for (int repeat = 0; repeat < 32 / sub; repeat++)
            put(p->scales + ((s * 32 / sub + repeat) * GEMM_ROWS + 8 * h) * 2, twice(scale[s / 4], s % 4));
    for (int s = 0; s < 4; s++) put(p->mins + (s * GEMM_ROWS + 8 * h) * 2, two(min[s / 2], s % 2 * 2));
}

INLINE void half_q4_k(gemm_panel *p, int h, panel_rows from, int64_t at, int sub) {
    k_head(p, h, from, at, sub);
    for (int s = 0; s < 4; s++) {
        __m256i q[8];
        columns32(from, at + (int64_t)offsetof(block_q4_k, q) + 32 * s, q);
        uint8_t *out = p->codes + 64 * s * GEMM_ROWS + 32 * h;
        for (int g = 0; g < 8; g++) {
            put(out + 64 * g, low4(q[g]));
            put(out + 64 * (8 + g), high4(q[g]));
        }
    }
}

INLINE void half_q5_k(gemm_panel *p, int h, panel_rows from, int64_t at, int sub) {
    __m256i q[8], fifth[8];
    k_head(p, h, from, at, sub);
    columns32(from, at + (int64_t)offsetof(block_q5_k, high), fifth);
    for (int s = 0; s < 4; s++) {
        columns32(from, at + (int64_t)offsetof(block_q5_k, q) + 32 * s, q);
        uint8_t *out = p->codes + 64 * s * GEMM_ROWS + 32 * h;
        for (int g = 0; g < 8; g++) {
            const __m256i bits = _mm256_srli_epi16(fifth[g], 2 * s);
            put(out + 64 * g, _mm256_or_si256(low4(q[g]), _mm256_and_si256(_mm256_slli_epi16(bits, 4), bytes(16))));
            put(out + 64 * (8 + g),
                _mm256_or_si256(high4(q[g]), _mm256_and_si256(_mm256_slli_epi16(bits, 3), bytes(16))));
        }
    }
}

INLINE void half_q6_k(gemm_panel *p, int h, panel_rows from, int64_t at, int sub) {
    (void)sub; /* its own sub-blocks are of 16 */
    __m256i scales[4];
    _mm256_store_ps(p->d + 8 * h, floats_of(from, at + (int64_t)offsetof(block_q6_k, d)));
    columns16(from, at + (int64_t)offsetof(block_q6_k, scales), scales);
    for (int s = 0; s < 16; s++) put(p->scales + (s * GEMM_ROWS + 8 * h) * 2, twice_signed(scales[s / 4], s % 4));
    for (int k = 0; k < 2; k++) {
        __m256i low[2][8], high[8];
        columns32(from, at + 64 * k, low[0]);
        columns32(from, at + 64 * k + 32, low[1]);
        columns32(from, at + (int64_t)offsetof(block_q6_k, high) + 32 * k, high);
        uint8_t *out = p->codes + 128 * k * GEMM_ROWS + 32 * h;
        for (int g = 0; g < 8; g++) {
            const __m256i two_bits = bytes(0x30), u = high[g];
            put(out + 64 * g, _mm256_or_si256(low4(low[0][g]), _mm256_and_si256(_mm256_slli_epi16(u, 4), two_bits)));
            put(out + 64 * (8 + g),
                _mm256_or_si256(low4(low[1][g]), _mm256_and_si256(_mm256_slli_epi16(u, 2), two_bits)));
            put(out + 64 * (16 + g), _mm256_or_si256(high4(low[0][g]), _mm256_and_si256(u, two_bits)));
            put(out + 64 * (24 + g),
                _mm256_or_si256(high4(low[1][g]), _mm256_and_si256(_mm256_srli_epi16(u, 2), two_bits)));
        }
    }
}

/* ---- Blocks of 32: codes and scale of sub-block s ---- */

/* Codes of 4 bits, as Q4_0, Q5_0, Q5_1 and IQ4 pack them: columns 0..15 in the low halves, 16..31 in the high ones. */
INLINE void columns4(panel_rows from, int64_t at, __m256i out[8]) {
    __m256i q[4];
    columns16(from, at, q);
    for (int g = 0; g < 4; g++) {
        out[g] = low4(q[g]);
        out[4 + g] = high4(q[g]);
    }
}

/* codes + 16 where byte has a bit of mask's. */
INLINE __m256i plus16_where(__m256i codes, __m256i byte, __m256i mask) {
#ifdef __AVX512BW__
    return _mm256_mask_add_epi8(codes, _mm256_test_epi8_mask(byte, mask), codes, bytes(16));
#else
    return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, mask), mask), bytes(16)));
#endif
}

/* Adds the fifth bits: bit 4g + j of a row's 32 belongs to byte j of group g; repacked, bit 8j + g does. */
INLINE void add_fifth_bits(__m256i bits, bool repacked, __m256i codes[8]) {
    if (repacked) {
        for (int g = 0; g < 8; g++) {
            const __m256i shifted = g < 4 ? _mm256_slli_epi32(bits, 4 - g) : _mm256_srli_epi32(bits, g - 4);
            codes[g] = _mm256_or_si256(codes[g], _mm256_and_si256(shifted, bytes(16)));
        }
        return;
    }
    const __m256i lane =
        _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    for (int g = 0; g < 8; g++) {
        const __m256i mask = _mm256_set1_epi32(g % 2 ? (int)0x80402010 : 0x08040201);
        codes[g] = plus16_where(codes[g], _mm256_shuffle_epi8(bits, _mm256_add_epi8(lane, bytes(g / 2))), mask);
    }
}

INLINE void sub_q5_0(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    __m256 d;
    __m256i bits;
    if (from.repacked) {
        d = floats_of(from, at);
        bits = word_of(from, at + (int64_t)offsetof(block_q5_0, high));
    } else { /* both at once: the scale in the lower half of word 0, the bits from its upper half on */
        __m256i head[4];
        columns16(from, at, head);
        d = lower_halves(head[0]);
        bits = _mm256_or_si256(_mm256_srli_epi32(head[0], 16), _mm256_slli_epi32(head[1], 16));
    }
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, d);
    columns4(from, at + (int64_t)offsetof(block_q5_0, q), codes);
    add_fifth_bits(bits, from.repacked, codes);
}

INLINE void sub_q5_1(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    const __m256 d = floats_of(from, at), m = floats_of(from, at + (int64_t)offsetof(block_q5_1, m));
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, d);
    /* d q + m = d (q - 16) + (m + 16 d) */
    _mm256_store_ps(p->m + s * GEMM_ROWS + 8 * h, _mm256_fmadd_ps(d, _mm256_set1_ps(16.0f), m));
    columns4(from, at + (int64_t)offsetof(block_q5_1, q), codes);
    add_fifth_bits(word_of(from, at + (int64_t)offsetof(block_q5_1, high)), from.repacked, codes);
}

INLINE void sub_q4_0(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, floats_of(from, at));
    columns4(from, at + (int64_t)offsetof(block_q4_0, q), codes);
    for (int g = 0; g < 8; g++) codes[g] = _mm256_add_epi8(codes[g], bytes(8)); /* q - 8 = (q + 8) - 16 */
}

INLINE void sub_q8_0(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, floats_of(from, at));
    columns32(from, at + (int64_t)offsetof(block_q8_0, q), codes);
}

static inline void levels_of(__m256i codes[8]) {
    const __m256i levels = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
    for (int g = 0; g < 8; g++) codes[g] = _mm256_shuffle_epi8(levels, codes[g]);
}

INLINE void sub_iq4_nl(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, floats_of(from, at));
    columns4(from, at + (int64_t)offsetof(block_iq4_nl, q), codes);
    levels_of(codes);
}

INLINE void sub_iq4_xs(gemm_panel *p, int h, panel_rows from, int64_t at, int64_t s, __m256i codes[8]) {
    const int j = (int)(s % 8);
    const __m256i low =
        _mm256_srl_epi32(word_of(from, at + (int64_t)offsetof(block_iq4_xs, scales_low)), _mm_cvtsi32_si128(4 * j));
    const __m256i high =
        _mm256_srl_epi32(_mm256_cvtepu16_epi32(half_of(from, at + (int64_t)offsetof(block_iq4_xs, scales_high))),
                         _mm_cvtsi32_si128(2 * j));
    /* see iq4_xs_scale */
    const __m256i scale = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                          _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256 scales = _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32)));
    _mm256_store_ps(p->d + s * GEMM_ROWS + 8 * h, _mm256_mul_ps(floats_of(from, at), scales));
    columns4(from, at + (int64_t)offsetof(block_iq4_xs, q) + 16 * j, codes);
    levels_of(codes);
}

/* ---- Panels ---- */

/* From fill_<stem>, which fills one half of a panel, the two forms of unpack. */
#define UNPACK(stem)                                                                           \
    static void unpack_##stem(gemm_panel *p, const uint8_t *const *rows, int64_t b) {          \
        for (int h = 0; h < 2; h++) fill_##stem(p, h, (panel_rows){rows + 8 * h, false}, b);   \
    }                                                                                          \
    static void unpack_repacked_##stem(gemm_panel *p, const uint8_t *const *rows, int64_t b) { \
        for (int h = 0; h < 2; h++) fill_##stem(p, h, (panel_rows){rows + h, true}, b);        \
    }

/* sub: columns that an accumulator can take before it is scaled, 16 or 32. */
#define UNPACK_K(stem, sub)                                                     \
    INLINE void fill_##stem(gemm_panel *p, int h, panel_rows from, int64_t b) { \
        half_##stem(p, h, from, b * (int64_t)sizeof(block_##stem), sub);        \
    }                                                                           \
    UNPACK(stem)

/* columns: of a block, 32 or 256. How signed codes are stored is the product's affair: it defines put_signed. */
#define UNPACK_BLOCKS(stem, columns, is_signed)                                               \
    INLINE void fill_##stem(gemm_panel *p, int h, panel_rows from, int64_t b) {               \
        const int64_t size = sizeof(block_##stem), begin = b * (p->depth / (columns)) * size; \
        for (int64_t s = 0; s < p->depth / 32; s++) {                                         \
            __m256i codes[8];                                                                 \
            sub_##stem(p, h, from, begin + s * 32 / (columns) * size, s, codes);              \
            for (int g = 0; g < 8; g++) {                                                     \
                if (is_signed) put_signed(p, h, 8 * s + g, codes[g]);                         \
                else put(p->codes + (8 * s + g) * 64 + 32 * h, codes[g]);                     \
            }                                                                                 \
        }                                                                                     \
    }                                                                                         \
    UNPACK(stem)

/* Of all formats; q5_k_sub: Q5_K's `sub`. */
#define UNPACK_ALL(q5_k_sub)        \
    UNPACK_K(q4_k, 32)              \
    UNPACK_K(q5_k, q5_k_sub)        \
    UNPACK_K(q6_k, 16)              \
    UNPACK_BLOCKS(q5_0, 32, false)  \
    UNPACK_BLOCKS(q5_1, 32, false)  \
    UNPACK_BLOCKS(q4_0, 32, false)  \
    UNPACK_BLOCKS(q8_0, 32, true)   \
    UNPACK_BLOCKS(iq4_nl, 32, true) \
    UNPACK_BLOCKS(iq4_xs, 256, true)

/* ---- Repacking ---- */

/* Interleaves blocks of 8 rows: of `size` bytes, `first` 2-byte numbers in front and `last` behind, words between.
 * fifth: the first word has a bit for each of 32 codes, which comes to lie where its code's byte does. */
static inline void interleave(uint8_t *to, const uint8_t *const rows[8], int64_t blocks, int64_t size, int first,
                              int last, bool fifth) {
    for (int64_t at = 0; at < blocks * size; at += size)
        for (int r = 0; r < 8; r++) {
            const uint8_t *from = rows[r] + at;
            uint8_t *out = to + 8 * at;
            int64_t i = 0;
            for (; i < 2 * first; i += 2) memcpy(out + 8 * i + 2 * r, from + i, 2);
            for (; i < size - 2 * last; i += 4) memcpy(out + 8 * i + 4 * r, from + i, 4);
            for (; i < size; i += 2) memcpy(out + 8 * i + 2 * r, from + i, 2);
            if (!fifth) continue;
            uint32_t bits, moved = 0;
            memcpy(&bits, from + 2 * first, 4);
            for (int c = 0; c < 32; c++) moved |= (bits >> c & 1) << (c % 4 * 8 + c / 4);
            memcpy(out + 16 * first + 4 * r, &moved, 4);
        }
}

#define REPACK(stem, first, last, fifth)                                                   \
    static void repack_##stem(uint8_t *to, const uint8_t *const rows[8], int64_t blocks) { \
        interleave(to, rows, blocks, sizeof(block_##stem), first, last, fifth);            \
    }
REPACK(q4_k, 0, 0, false)
REPACK(q5_k, 0, 0, false)
REPACK(q6_k, 0, 1, false)
REPACK(q5_0, 1, 0, true)
REPACK(q5_1, 2, 0, true)
REPACK(q4_0, 1, 0, false)
REPACK(q8_0, 1, 0, false)
REPACK(iq4_nl, 1, 0, false)
REPACK(iq4_xs, 2, 0, false)

/* The kernel of a format: `of` names its product. */
#define KERNEL(id, by_256, of_13_bits, stem, of)   \
    {                                              \
        .format = DG_##id,                         \
        .k_quant = by_256,                         \
        .wide = of_13_bits,                        \
        .unpack = unpack_##stem,                   \
        .multiply = multiply_##of,                 \
        .repack = repack_##stem,                   \
        .unpack_repacked = unpack_repacked_##stem, \
    }

#endif
