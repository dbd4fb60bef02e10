/* Operations over the whole vocabulary: the choice of a token, and self-conditioning. */
#include <math.h>
#include <string.h>

#include "op_args.h"
#include "simd_math.h"
#include "simd_ops.h"
#include "simd_tile.h"

enum {
    CHUNK = 1024,  /* ids per partial sum of a choice */
    WORDS = 64,    /* rows of the embedding per block of self-conditioning */
    STRETCH = 256, /* columns per block: a whole number of any format's blocks and of panels */
};

/* e^(z - peak), 0 in lanes from n on. */
VF vf weights_of(const float *z, int64_t n, float peak, vf *distance) {
    *distance = vf_sub(vf_load_first(z, n), vf_set(peak));
    return vf_select(vf_first(n), vf_exp(*distance), vf_set(0.0f));
}

/* Sums of e^d and d e^d, d = z - peak: in lanes within a chunk, in double across. */
typedef struct sums {
    double total, weighted;
} sums;

static sums chunk_sums(const float *z, int64_t n, float peak) {
    vf sum = vf_set(0.0f), moment = vf_set(0.0f);
    for (int64_t v = 0; v < n; v += LANES) {
        vf d;
        const vf e = weights_of(z + v, n - v, peak, &d);
        sum = vf_add(sum, e);
        moment = vf_fma(e, d, moment);
    }
    return (sums){.total = (double)vf_sum(sum), .weighted = (double)vf_sum(moment)};
}

static sums row_sums(const float *z, int64_t n, float peak) {
    sums all = {0.0, 0.0};
    for (int64_t c = 0; c < n; c += CHUNK) {
        const sums s = chunk_sums(z + c, least(CHUNK, n - c), peak);
        all.total += s.total;
        all.weighted += s.weighted;
    }
    return all;
}

/* The first id at which the cumulative sum passes `aim`, or -1. The chunk is found first, then the id in it. */
static int64_t draw(const float *z, int64_t n_vocab, float peak, double aim) {
    double below = 0.0;
    for (int64_t c = 0; c < n_vocab; c += CHUNK) {
        const int64_t n = least(CHUNK, n_vocab - c);
        const double total = chunk_sums(z + c, n, peak).total;
        if (below + total <= aim) {
            below += total;
            continue;
        }
        for (int64_t k = 0; k < n; k += LANES) {
            float lane[LANES];
            vf d;
            vf_store(lane, weights_of(z + c + k, n - k, peak, &d));
            for (int64_t l = 0; l < least(LANES, n - k); l++) {
                below += (double)lane[l];
                if (below > aim) return c + k + l;
            }
        }
    }
    return -1;
}

static void choose_item(void *arg, int64_t i, int32_t thread) {
    const choose_args *a = arg;
    const float *z = a->z + i * a->n_vocab, peak = largest_of(z, a->n_vocab) + nothing_of(z, a->n_vocab);
    (void)thread;
    if (isnan(peak)) {
        a->out[i] = (dg_choice){.entropy = NAN, .argmax = -1, .sample = -1};
        return;
    }
    int64_t best = 0;
    while (best < a->n_vocab - 1 && z[best] != peak) best++;
    const sums s = row_sums(z, a->n_vocab, peak);
    const int64_t sample = draw(z, a->n_vocab, peak, a->u[i] * s.total);
    const double entropy = log(s.total) - s.weighted / s.total;
    a->out[i] = (dg_choice){.entropy = entropy > 0.0 ? (float)entropy : 0.0f,
                            .argmax = (int32_t)best,
                            .sample = (int32_t)(sample < 0 ? best : sample)};
}

void SIMD(choose)(const ops *o, dg_choice *out, const float *z, int64_t n, int64_t n_vocab, const double *u) {
    pool_run(o->pool, choose_item, &(choose_args){.out = out, .z = z, .n_vocab = n_vocab, .u = u}, n);
}

/* ---- Self-conditioning ---- */

typedef struct conditioning {
    const ops *o;
    float *y, *p;
    const float *z;
    const tensor *table;
    int64_t n;
    float scale;
} conditioning;

/* p = softmax(z) * scale, a row */
static void share_item(void *arg, int64_t i, int32_t thread) {
    const conditioning *a = arg;
    const int64_t n_vocab = a->table->rows;
    const float *z = a->z + i * n_vocab, peak = largest_of(z, n_vocab);
    float *p = a->p + i * n_vocab;
    (void)thread;
    const vf share = vf_set((float)((double)a->scale / row_sums(z, n_vocab, peak).total));
    for (int64_t v = 0; v < n_vocab; v += LANES) {
        vf d;
        vf_store_first(p + v, vf_mul(weights_of(z + v, n_vocab - v, peak, &d), share), n_vocab - v);
    }
}

/* Computes STRETCH columns of y = p table; each block of the embedding is decoded once for all rows. */
static void blend_item(void *arg, int64_t item, int32_t thread) {
    const conditioning *a = arg;
    const tensor *t = a->table;
    const dg_format *f = t->format;
    const int64_t c0 = item * STRETCH, columns = least(STRETCH, t->cols - c0);
    float *packed = scratch_of(a->o, thread), *words = packed + WORDS * STRETCH, *shares = words + WORDS * STRETCH;
    for (int64_t v0 = 0; v0 < t->rows; v0 += WORDS) {
        const int64_t n = least(WORDS, t->rows - v0);
        for (int64_t v = 0; v < n; v++)
            f->decode(tensor_row(t, 0, v0 + v) + c0 / f->block * f->bytes, words + v * STRETCH, columns / f->block);
        for (int64_t c = 0; c < columns; c += COLUMNS)
            pack_columns(packed + c * WORDS, words + c, STRETCH, columns - c, n);
        for (int64_t i = 0; i < a->n; i += TILE) {
            const int64_t rows = least(TILE, a->n - i);
            const float *p[TILE];
            float *y[TILE];
            for (int64_t r = 0; r < rows; r++) {
                p[r] = a->p + (i + r) * t->rows + v0;
                y[r] = a->y + (i + r) * t->cols;
            }
            pack_rows(shares, rows, p, rows, n);
            for (int64_t c = 0; c < columns; c += COLUMNS) {
                const panel block = {
                    .packed = packed + c * WORDS, .depth = n, .at = c0 + c, .count = least(COLUMNS, columns - c)};
                tile(rows, &block, y, shares, v0 ? WHOLE : NULL);
            }
        }
    }
}

void SIMD(self_condition_dense)(const ops *o, float *y, const float *z, const tensor *table, int64_t n, float scale,
                                float *work) {
    conditioning a = {.o = o, .y = y, .p = work, .z = z, .table = table, .n = n, .scale = scale};
    pool_run(o->pool, share_item, &a, n);
    pool_run(o->pool, blend_item, &a, (table->cols + STRETCH - 1) / STRETCH);
}
