/* The one product that matrices, attention and self-conditioning share: a tile of rows times a panel of columns, both
 * packed so that the inner loop reads straight on, as outer products in registers. */
#ifndef DG_SIMD_TILE_H
#define DG_SIMD_TILE_H

#include <stddef.h>

#include "simd.h"

enum {
    WIDE = 2,                          /* vectors of columns in a tile */
    COLUMNS = WIDE * LANES,            /* columns of a panel */
    /* rows of a tile: of the registers, TILE * WIDE hold sums and WIDE + 1 factors */
    TILE = REGISTERS == 32 ? 12 : 6,
};

#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

/* packed[k][COLUMNS] for k in [0, depth); outputs go to columns [at, at + count) of the rows of y. */
typedef struct panel {
    const float *packed;
    int64_t depth;
    int64_t at, count;
} panel;

/* y[r][at + c] = y[r][at + c] * keep[r] + sum over k of x[k][r] packed[k][c], x packed as [depth][rows]; keep NULL:
 * y is only written. Every output sums in the order of k, whatever else is in its tile. */
VF void tile_of(int rows, const panel *p, float *const *y, const float *x, const float *keep) {
    vf sum[TILE][WIDE];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int c = 0; c < WIDE; c++) sum[r][c] = vf_set(0.0f);
    const float *b = p->packed;
    for (int64_t k = 0; k < p->depth; k++, b += COLUMNS, x += rows) {
        vf column[WIDE];
        UNROLLED for (int c = 0; c < WIDE; c++) column[c] = vf_load(b + c * LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            const vf value = vf_set(x[r]);
            UNROLLED for (int c = 0; c < WIDE; c++) sum[r][c] = vf_fma(value, column[c], sum[r][c]);
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) {
        UNROLLED for (int c = 0; c < WIDE; c++) {
            const int64_t left = p->count - c * LANES;
            float *out = y[r] + p->at + c * LANES;
            if (left > 0)
                vf_store_first(out, keep ? vf_fma(vf_load_first(out, left), vf_set(keep[r]), sum[r][c]) : sum[r][c],
                               left);
        }
    }
}

/* `keep` for sums that are only added to. */
static const float WHOLE[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

/* The same for 1 to TILE rows. */
static inline void tile(int64_t rows, const panel *p, float *const *y, const float *x, const float *keep) {
    switch (rows) {
        /* clang-format off */
#define CASE(n) case n: tile_of(n, p, y, x, keep); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if !defined(__AVX2__) || defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
/* clang-format on */
#undef CASE
    }
}

/* packed[k][c] = rows[c][k] for k in [0, depth) and the first `count` of `width` columns; 0 in the others. */
static inline void pack_rows(float *packed, int64_t width, const float *const *rows, int64_t count, int64_t depth) {
    const float *const end = packed + width * depth;
    for (int64_t k = 0; k < depth; k += LANES)
        for (int64_t c = 0; c < width; c += LANES) {
            vf square[LANES];
            UNROLLED for (int i = 0; i < LANES; i++) square[i] =
                c + i < count ? vf_load_first(rows[c + i] + k, depth - k) : vf_set(0.0f);
            vf_transpose(square);
            float *out = packed + k * width + c;
            for (int i = 0; i < LANES && k + i < depth; i++, out += width) {
                /* what is too much is written over */
                if (c + LANES <= width || (width < LANES && out + LANES <= end)) vf_store(out, square[i]);
                else vf_store_first(out, square[i], width - c);
            }
        }
}

/* packed[k][c] = rows[k][c] for the first `count` columns, and 0 in the others. */
static inline void pack_columns(float *packed, const float *rows, int64_t stride, int64_t count, int64_t depth) {
    for (int64_t k = 0; k < depth; k++, rows += stride, packed += COLUMNS)
        UNROLLED for (int c = 0; c < COLUMNS; c += LANES) vf_store(packed + c, vf_load_first(rows + c, count - c));
}

#endif
