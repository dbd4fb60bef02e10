/* Encodes rows of a matrix whose inputs have means. The errors e of a row add sum(mean * e) to every output, which an
 * encoder of single blocks cannot see. Here the blocks of a row are encoded in order, and `off` is this sum so far.
 * Over the columns that follow, with variances v of their inputs, sum(v * e^2) + (off + sum(mean * e))^2 is smallest
 * for e = -off / (1 + sum(mean^2 / v)) * mean / v. Their values are moved by this e before they are rounded. */
#include <string.h>

#include "formats.h"
#include "tiny.h"

enum {
    ROWS = 4 /* rows that are encoded together: as many as an encoder searches at once */,
    MOST_BLOCK = 256,
    MOST_BYTES = 2 * MOST_BLOCK
};

typedef struct side_by_side {
    float values[ROWS * MOST_BLOCK], importance[ROWS * MOST_BLOCK];
    uint8_t blocks[ROWS * MOST_BYTES];
    double off[ROWS];
    float most[ROWS]; /* the largest value of each row */
} side_by_side;

static double absorbed(const float *mean, const float *pull, int64_t n) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; j++) sum += (double)mean[j] * (double)pull[j];
    return sum;
}

/* Encodes block b of n rows. rest: sum(mean^2 / v) over its columns and those behind it. */
static void encode_block(const dg_format *f, const float *values, uint8_t *blocks, int64_t n, int64_t n_cols, int64_t b,
                         const dg_columns *of, double rest, side_by_side *s) {
    const int64_t size = f->block, at = b * size, row_bytes = n_cols / size * f->bytes;
    for (int64_t r = 0; r < n; r++) {
        const float move = (float)(s->off[r] / (1.0 + rest));
        for (int64_t j = 0; j < size; j++)
            s->values[r * size + j] = values[r * n_cols + at + j] - move * of->pull[at + j];
        memcpy(s->importance + r * size, of->importance + at, (size_t)size * sizeof *of->importance);
    }
    f->encode(s->values, s->blocks, n, s->importance);
    f->decode(s->blocks, s->values, n);
    for (int64_t r = 0; r < n; r++) { /* a move that is more than all of a tiny row */
        if (s->most[r] >= TINY || !far_too_large(s->values + r * size, size, s->most[r])) continue;
        f->encode(values + r * n_cols + at, s->blocks + r * f->bytes, 1, of->importance + at);
        f->decode(s->blocks + r * f->bytes, s->values + r * size, 1);
    }
    for (int64_t r = 0; r < n; r++) {
        memcpy(blocks + r * row_bytes + b * f->bytes, s->blocks + r * f->bytes, (size_t)f->bytes);
        for (int64_t j = 0; j < size; j++)
            s->off[r] +=
                (double)of->mean[at + j] * ((double)s->values[r * size + j] - (double)values[r * n_cols + at + j]);
    }
}

void dg_encode_rows(const dg_format *f, const float *values, void *blocks, int64_t n_rows, int64_t n_cols,
                    const dg_columns *of) {
    const int64_t n_blocks = n_cols / f->block;
    const double all = absorbed(of->mean, of->pull, n_cols);
    for (int64_t row = 0; row < n_rows; row += ROWS) {
        side_by_side s = {.off = {0.0}};
        double rest = all;
        const int64_t n = n_rows - row < ROWS ? n_rows - row : ROWS;
        for (int64_t r = 0; r < n; r++) s.most[r] = largest(values + (row + r) * n_cols, n_cols);
        for (int64_t b = 0; b < n_blocks; b++) {
            encode_block(f, values + row * n_cols, (uint8_t *)blocks + row * n_blocks * f->bytes, n, n_cols, b, of,
                         rest, &s);
            rest -= absorbed(of->mean + b * f->block, of->pull + b * f->block, f->block);
            rest = rest > 0.0 ? rest : 0.0; /* which it is, but for rounding */
        }
    }
}
