/* Quantised weights as int8 codes. A stage is STAGE columns of a row. It is copied to shared memory as it is in the
 * file; its codes and scales are unpacked from there.
 *
 * Rows are aligned to 2 bytes only, but copies need 16-byte lines. So all 16-byte lines that a stage touches are
 * copied: CHUNKS lines, PITCH bytes apart from the next row. The low bits of the row's address say where in the first
 * line the stage begins (skew()).
 *
 * Shared memory has 32 banks of 4 bytes, and two threads that read different words of one bank wait for each other.
 * PITCH is an odd number of 16-byte lines, so that 8 rows begin in 8 different groups of 4 banks: 8 threads that read
 * the same line of 8 rows never use a bank twice.
 */
#ifndef DG_CUDA_UNPACK_H
#define DG_CUDA_UNPACK_H

#include <stddef.h>

#include "cuda.h"
#include "formats.cuh"

constexpr int STAGE = 128, SUB = 32, STAGE_SUBS = STAGE / SUB; /* columns; a sub-block of SUB has its own scale */
constexpr int LINE = 16;                                       /* bytes */

using bytes = const unsigned char *;

__device__ inline int skew(bytes p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % LINE); }
__device__ inline uint32_t two_bytes(bytes p) { return *reinterpret_cast<const uint16_t *>(p); }
__device__ inline uint32_t four_bytes(bytes p) { return two_bytes(p) | two_bytes(p + 2) << 16; } /* aligned to 2 */
__device__ inline uint32_t word(bytes p) { return *reinterpret_cast<const uint32_t *>(p); }     /* aligned to 4 */
__device__ inline float half_at(bytes p) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(two_bytes(p))));
}

/* A word holds four codes, one per byte. To make a stored code b signed, it becomes b - 8 (4 bits), b - 16 (5 bits) or
 * b - 32 (6 bits), in all four bytes at once and without a borrow from one byte to the next. */
constexpr uint32_t NIBBLES = 0x0f0f0f0fu, ONES = 0x01010101u;
__device__ inline uint32_t bits_apart(uint32_t four) { return (four & 15u) * 0x00204081u & ONES; } /* bit i to byte i */
__device__ inline uint32_t less_8(uint32_t q) { return (q & 0x07070707u) | (~q & 0x08080808u) * 0x1fu; }
__device__ inline uint32_t less_32(uint32_t q) { return (q & 0x1f1f1f1fu) | (~q & 0x20202020u) * 7u; }

/* Members of each codes_of_* type:
 *   INTEGER       sub-blocks have integer scales, and 256 columns share a float d: see scales()
 *   MINIMUMS      sub-blocks have integer minimums too, and 256 columns share a float dmin
 *   OFFSETS       each sub-block has a float minimum: see offset()
 *   BLOCKS        false for floats, which have no codes (half_tile.cuh)
 *   SUM_COLUMNS   columns that share a scale, 32 or 16
 *   chunk()       sets *from to the address of line c of a stage in device memory; false: the line is not needed. subs:
 *                 the number of sub-blocks of the row in this stage
 *   codes()       the codes of sub-block j: *low has columns 4 t .. 4 t + 3, *high 16 + 4 t .. 16 + 4 t + 3
 * Parameters: p is the stage in shared memory, row the address of the row in device memory.
 */

/* ---- Formats with blocks of 32 columns, each with a float scale ---- */

template <class FORMAT> struct codes_of_32 {
    using block = typename FORMAT::block;
    static constexpr bool INTEGER = false, MINIMUMS = false, OFFSETS = false, BLOCKS = true;
    static constexpr int BYTES = sizeof(block), CHUNKS = (STAGE_SUBS * BYTES + LINE - 2 + LINE - 1) / LINE,
                         PITCH = (CHUNKS | 1) * LINE, SUM_COLUMNS = 32;

    __device__ static bool chunk(bytes row, int stage, int subs, int c, bytes *from) {
        const bytes first = row + stage * (STAGE_SUBS * BYTES);
        *from = first - skew(first) + c * LINE;
        return *from < first + subs * BYTES;
    }
    __device__ static bytes at(bytes p, bytes row, int stage, int j) {
        return p + skew(row + stage * (STAGE_SUBS * BYTES)) + j * BYTES;
    }
    __device__ static float scale(bytes p, bytes row, int stage, int j) {
        return half_at(at(p, row, stage, j) + offsetof(block, d));
    }
};

struct codes_of_q8_0 : codes_of_32<of_q8_0> {
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes q = at(p, row, stage, j) + offsetof(block, q) + 4 * t;
        *low = four_bytes(q);
        *high = four_bytes(q + 16);
    }
};

struct codes_of_q4_0 : codes_of_32<of_q4_0> {
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const uint32_t q = four_bytes(at(p, row, stage, j) + offsetof(block, q) + 4 * t);
        *low = less_8(q & NIBBLES);
        *high = less_8(q >> 4 & NIBBLES);
    }
};

struct codes_of_iq4_nl : codes_of_32<of_iq4_nl> {
    /* The levels for the four nibbles in the low half of `four`, one per byte. */
    __device__ static uint32_t levels(uint32_t four) {
        /* iq4_level(0..7), (8..15) */
        const uint32_t low = pick_bytes(0xbfad9881u, 0xf6eaddcfu, four),
                       high = pick_bytes(0x26190d01u, 0x71594535u, four);
        return pick_bytes(low, high, 0x3210u | (four & 0x8888u) >> 1);
    }
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const uint32_t q = four_bytes(at(p, row, stage, j) + offsetof(block, q) + 4 * t);
        /* first: the levels of bytes 0 and 1 of q, low and high nibble of each; second: of bytes 2 and 3 */
        const uint32_t first = levels(q & 0xffffu), second = levels(q >> 16);
        *low = pick_bytes(first, second, 0x6420u);
        *high = pick_bytes(first, second, 0x7531u);
    }
};

struct codes_of_q5_0 : codes_of_32<of_q5_0> {
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes b = at(p, row, stage, j);
        const uint32_t q = four_bytes(b + offsetof(block, q) + 4 * t),
                       no_fifth = ~four_bytes(b + offsetof(block, high)) >> 4 * t;
        *low = (q & NIBBLES) | bits_apart(no_fifth) * 0xf0u;
        *high = (q >> 4 & NIBBLES) | bits_apart(no_fifth >> 16) * 0xf0u;
    }
};

struct codes_of_q5_1 : codes_of_32<of_q5_1> {
    static constexpr bool OFFSETS = true; /* hides the member of codes_of_32 */
    __device__ static float offset(bytes p, bytes row, int stage, int j) {
        return half_at(at(p, row, stage, j) + offsetof(block, m));
    }
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes b = at(p, row, stage, j);
        const uint32_t q = four_bytes(b + offsetof(block, q) + 4 * t),
                       fifth = four_bytes(b + offsetof(block, high)) >> 4 * t;
        *low = (q & NIBBLES) | bits_apart(fifth) << 4;
        *high = (q >> 4 & NIBBLES) | bits_apart(fifth >> 16) << 4;
    }
};

/* ---- Formats with blocks of 256 columns: a stage is half of a block ---- */

/* The scales of a row's stage. */
struct stage_scales {
    uint32_t scale[2]; /* integer scales, one per byte, each for 32 columns or for 16 */
    uint32_t min; /* integer minimums, one per byte, each for 32 columns */
    float d, dmin; /* the factors of all scales and of all minimums */
};

/* scale_and_min() of quants/ for four sub-blocks at once; which: the half of the block. */
__device__ inline stage_scales scales_of_k(bytes p, int which) {
    const uint32_t d = word(p), first = word(p + 4), second = word(p + 8), third = word(p + 12);
    stage_scales s;
    s.scale[0] = which ? (third & NIBBLES) | (first >> 2 & 0x30303030u) : first & 0x3f3f3f3fu;
    s.scale[1] = 0;
    s.min = which ? (third >> 4 & NIBBLES) | (second >> 2 & 0x30303030u) : second & 0x3f3f3f3fu;
    s.d = __half2float(__ushort_as_half(static_cast<unsigned short>(d & 0xffffu)));
    s.dmin = __half2float(__ushort_as_half(static_cast<unsigned short>(d >> 16)));
    return s;
}

struct codes_of_q4_k {
    using block = block_q4_k;
    static constexpr bool INTEGER = true, MINIMUMS = true, OFFSETS = false, BLOCKS = true;
    static constexpr int CHUNKS = 5, PITCH = CHUNKS * LINE, SUM_COLUMNS = 32, HEAD = offsetof(block, q);
    static_assert(HEAD == LINE && sizeof(block) % LINE == 0, "lines of whole parts");

    __device__ static bool chunk(bytes row, int stage, int, int c, bytes *from) {
        *from = row + stage / 2 * static_cast<int>(sizeof(block)) + (c ? stage % 2 * 64 : 0) + c * LINE;
        return true;
    }
    __device__ static stage_scales scales(bytes p, bytes, int stage) { return scales_of_k(p, stage % 2); }
    __device__ static void codes(bytes p, bytes, int, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes q = p + HEAD + j / 2 * 32 + 4 * t;
        *low = word(q) >> j % 2 * 4 & NIBBLES;
        *high = word(q + 16) >> j % 2 * 4 & NIBBLES;
    }
};

struct codes_of_q5_k {
    using block = block_q5_k;
    static constexpr bool INTEGER = true, MINIMUMS = true, OFFSETS = false, BLOCKS = true;
    static constexpr int CHUNKS = 7, PITCH = CHUNKS * LINE, SUM_COLUMNS = 32, HEAD = offsetof(block, q),
                         FIFTH = offsetof(block, high);
    static_assert(HEAD == 3 * LINE && FIFTH == LINE && sizeof(block) % LINE == 0, "lines of whole parts");

    __device__ static bool chunk(bytes row, int stage, int, int c, bytes *from) {
        *from = row + stage / 2 * static_cast<int>(sizeof(block)) + (c < 3 ? 0 : stage % 2 * 64) + c * LINE;
        return true;
    }
    __device__ static stage_scales scales(bytes p, bytes, int stage) { return scales_of_k(p, stage % 2); }
    __device__ static void codes(bytes p, bytes, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes q = p + HEAD + j / 2 * 32 + 4 * t, fifth = p + FIFTH + 4 * t;
        const int bit = stage % 2 * STAGE_SUBS + j;
        *low = (word(q) >> j % 2 * 4 & NIBBLES) | (word(fifth) >> bit & ONES) << 4;
        *high = (word(q + 16) >> j % 2 * 4 & NIBBLES) | (word(fifth + 16) >> bit & ONES) << 4;
    }
};

struct codes_of_q6_k { /* a block has 210 bytes; its three arrays are copied separately, each from a line's start */
    using block = block_q6_k;
    static constexpr bool INTEGER = true, MINIMUMS = false, OFFSETS = false, BLOCKS = true;
    /* the lines in shared memory at which the second and the third array begin */
    static constexpr int HIGH = 5, REST = 8, CHUNKS = 10, PITCH = 11 * LINE, SUM_COLUMNS = 16;

    __device__ static bytes low_of(bytes row, int stage) {
        return row + stage / 2 * static_cast<int>(sizeof(block)) + stage % 2 * 64;
    }
    __device__ static bytes high_of(bytes row, int stage) {
        return row + stage / 2 * static_cast<int>(sizeof(block)) + offsetof(block, high) + stage % 2 * 32;
    }
    __device__ static bytes rest_of(bytes row, int stage) {
        return row + stage / 2 * static_cast<int>(sizeof(block)) + offsetof(block, scales);
    }

    __device__ static bool chunk(bytes row, int stage, int, int c, bytes *from) {
        const bytes piece = c < HIGH ? low_of(row, stage) : c < REST ? high_of(row, stage) : rest_of(row, stage);
        *from = piece - skew(piece) + (c < HIGH ? c : c < REST ? c - HIGH : c - REST) * LINE;
        return true;
    }
    __device__ static stage_scales scales(bytes p, bytes row, int stage) {
        const bytes rest = p + REST * LINE + skew(rest_of(row, stage));
        stage_scales s;
        for (int i = 0; i < 2; i++) s.scale[i] = four_bytes(rest + stage % 2 * 8 + 4 * i);
        s.min = 0;
        s.d = half_at(rest + 16);
        s.dmin = 0.0f;
        return s;
    }
    __device__ static void codes(bytes p, bytes row, int stage, int j, int t, uint32_t *low, uint32_t *high) {
        const bytes four = p + skew(low_of(row, stage)) + j % 2 * 32 + 4 * t,
                    two = p + HIGH * LINE + skew(high_of(row, stage)) + 4 * t;
        *low = less_32((four_bytes(four) >> j / 2 * 4 & NIBBLES) | (four_bytes(two) >> 2 * j & 0x03030303u) << 4);
        *high = less_32((four_bytes(four + 16) >> j / 2 * 4 & NIBBLES) | (four_bytes(two + 16) >> 2 * j & 0x03030303u)
                                                                             << 4);
    }
};

/* Calls f(codes_of_...()) for a format with codes; returns false for other formats. */
template <class F> static inline bool for_codes(int32_t format, F f) {
    switch (format) {
    case DG_Q4_K: f(codes_of_q4_k()); return true;
    case DG_Q5_K: f(codes_of_q5_k()); return true;
    case DG_Q6_K: f(codes_of_q6_k()); return true;
    case DG_Q8_0: f(codes_of_q8_0()); return true;
    case DG_Q5_0: f(codes_of_q5_0()); return true;
    case DG_Q5_1: f(codes_of_q5_1()); return true;
    case DG_Q4_0: f(codes_of_q4_0()); return true;
    case DG_IQ4_NL: f(codes_of_iq4_nl()); return true;
    default: return false;
    }
}

#endif
