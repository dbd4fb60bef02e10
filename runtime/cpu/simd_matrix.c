/* Products of weights in float32: a panel of weight rows is decoded and packed once, and multiplied by all rows of x.
 */
#include <string.h>

#include "simd_math.h"
#include "simd_ops.h"
#include "simd_tile.h"

enum {
    DEPTH = 256,              /* columns of the weights decoded at a time; a whole number of any format's blocks */
    PANEL = DEPTH * COLUMNS,  /* floats of a decoded panel */
    BATCH = 240,              /* rows of an expert whose gate and up are held together: whole tiles */
};

/* Weight rows [row, row + COLUMNS) of an expert over DEPTH columns from `from`, into packed[PANEL]. */
static panel weights_panel(const tensor *w, int64_t expert, int64_t row, int64_t from, float *packed, float *decoded) {
    const dg_format *f = w->format;
    const int64_t depth = least(DEPTH, w->cols - from), count = least(COLUMNS, w->rows - row);
    const float *rows[COLUMNS];
    for (int64_t r = 0; r < count; r++) {
        rows[r] = decoded + r * DEPTH;
        f->decode(tensor_row(w, expert, row + r) + from / f->block * f->bytes, decoded + r * DEPTH, depth / f->block);
    }
    pack_rows(packed, COLUMNS, rows, count, depth);
    return (panel){.packed = packed, .depth = depth, .at = row, .count = count};
}

/* Rows of a matrix: row i of `n` is row at[i] / divide of data, at NULL: row i. */
typedef struct strided {
    float *data;
    int64_t n, cols;
    const int32_t *at;
    int64_t divide;
} strided;

static float *row_of(const strided *s, int64_t i) { return s->data + (s->at ? s->at[i] / s->divide : i) * s->cols; }

/* The tile of rows from i on, packed into n * cols floats that hold tile behind tile. */
static void pack_tile(float *packed, const strided *x, int64_t i) {
    const int64_t rows = least(TILE, x->n - i);
    const float *in[TILE];
    for (int64_t r = 0; r < rows; r++) in[r] = row_of(x, i + r);
    pack_rows(packed + i * x->cols, rows, in, rows, x->cols);
}

/* y = x W^T for the panel's columns, x packed, over columns from `from` on: written where these are the first, else
 * added to. */
static void multiply(const panel *p, const strided *y, const float *x, int64_t cols, int64_t from) {
    for (int64_t i = 0; i < y->n; i += TILE) {
        const int64_t rows = least(TILE, y->n - i);
        float *out[TILE];
        for (int64_t r = 0; r < rows; r++) out[r] = row_of(y, i + r);
        tile(rows, p, out, x + i * cols + from * rows, from ? WHOLE : NULL);
    }
}

typedef struct product {
    const ops *o;
    const tensor *w;
    strided y, x;
    float *packed;
} product;

static void pack_item(void *arg, int64_t item, int32_t thread) {
    const product *a = arg;
    (void)thread;
    pack_tile(a->packed, &a->x, item * TILE);
}

static void matmul_item(void *arg, int64_t item, int32_t thread) {
    const product *a = arg;
    float *packed = scratch_of(a->o, thread);
    for (int64_t from = 0; from < a->w->cols; from += DEPTH) {
        const panel p = weights_panel(a->w, 0, item * COLUMNS, from, packed, packed + PANEL);
        multiply(&p, &a->y, a->packed, a->w->cols, from);
    }
}

void SIMD(matmul)(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    product a = {
        o, w, {.data = y, .n = n, .cols = w->rows}, {.data = (float *)(uintptr_t)x, .n = n, .cols = w->cols}, work};
    pool_run(o->pool, pack_item, &a, (n + TILE - 1) / TILE);
    pool_run(o->pool, matmul_item, &a, (w->rows + COLUMNS - 1) / COLUMNS);
}

/* ---- Experts ---- */

typedef struct mixture {
    const ops *o;
    const tensor *gate, *up, *down;
    const float *x;
    expert_groups g;
    float *packed;  /* [n * k][d_model] by place */
    int64_t k;
    int64_t panels; /* per expert */
} mixture;

/* The rows of x that an expert reads. */
static void pack_expert(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = a->g.list[item], first = a->g.start[e], d = a->gate->cols;
    const strided x = {.data = (float *)(uintptr_t)a->x,
                       .n = a->g.start[e + 1] - first,
                       .cols = d,
                       .at = a->g.pairs + first,
                       .divide = a->k};
    (void)thread;
    for (int64_t i = 0; i < x.n; i += TILE) pack_tile(a->packed + first * d, &x, i);
}

/* Gate and up of one panel of an expert's rows, straight to the activated hidden values. */
static void gate_up_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = a->g.list[item / a->panels], row = item % a->panels * COLUMNS, first = a->g.start[e],
                  n = a->g.start[e + 1] - first;
    const int64_t d = a->gate->cols, d_expert = a->gate->rows, count = least(COLUMNS, d_expert - row);
    float *packed = scratch_of(a->o, thread), *decoded = packed + PANEL, *ups = decoded + PANEL;
    for (int64_t i = 0; i < n; i += BATCH) {
        const strided hidden = {
            .data = a->g.hidden + (first + i) * d_expert, .n = least(BATCH, n - i), .cols = d_expert};
        const strided up = {.data = ups, .n = hidden.n, .cols = COLUMNS};
        const float *x = a->packed + (first + i) * d;
        for (int64_t from = 0; from < d; from += DEPTH) {
            panel p = weights_panel(a->gate, e, row, from, packed, decoded);
            multiply(&p, &hidden, x, d, from);
            p = weights_panel(a->up, e, row, from, packed, decoded);
            p.at = 0;
            multiply(&p, &up, x, d, from);
        }
        for (int64_t t = 0; t < hidden.n; t++) {
            float *h = hidden.data + t * d_expert + row;
            const float *u = ups + t * COLUMNS;
            for (int64_t c = 0; c < count; c += LANES)
                vf_store_first(h + c, vf_mul(vf_gelu(vf_load_first(h + c, count - c)), vf_load_first(u + c, count - c)),
                               count - c);
        }
    }
}

/* An expert's hidden values, packed in place. */
static void pack_hidden(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = a->g.list[item], cols = a->down->cols, n = a->g.start[e + 1] - a->g.start[e];
    float *hidden = a->g.hidden + a->g.start[e] * cols, *copy = scratch_of(a->o, thread);
    for (int64_t i = 0; i < n; i += TILE) {
        const strided x = {.data = copy, .n = least(TILE, n - i), .cols = cols};
        memcpy(copy, hidden + i * cols, (size_t)(x.n * cols) * sizeof *copy);
        pack_tile(hidden + i * cols, &x, 0);
    }
}

static void down_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = a->g.list[item / a->panels], row = item % a->panels * COLUMNS, first = a->g.start[e],
                  cols = a->down->cols;
    const strided y = {
        .data = a->g.out, .n = a->g.start[e + 1] - first, .cols = a->down->rows, .at = a->g.pairs + first, .divide = 1};
    float *packed = scratch_of(a->o, thread);
    for (int64_t from = 0; y.n > 0 && from < cols; from += DEPTH) {
        const panel p = weights_panel(a->down, e, row, from, packed, packed + PANEL);
        multiply(&p, &y, a->g.hidden + first * cols, cols, from);
    }
}

void SIMD(experts)(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                   const int32_t *experts, const float *weights, int64_t n, int64_t k, const expert_feed *feed,
                   void *work) {
    mixture a = {.o = o, .gate = gate, .up = up, .down = down, .x = x, .k = k};
    a.g = group_by_expert(work, experts, n, k, gate->cols, gate->rows, gate->experts);
    a.packed = (float *)(void *)a.g.rest;
    for (int32_t count; (count = next_experts(feed, &a.g)) > 0;) {
        pool_run(o->pool, pack_expert, &a, count);
        a.panels = (gate->rows + COLUMNS - 1) / COLUMNS;
        pool_run(o->pool, gate_up_item, &a, count * a.panels);
        pool_run(o->pool, pack_hidden, &a, count);
        a.panels = (down->rows + COLUMNS - 1) / COLUMNS;
        pool_run(o->pool, down_item, &a, count * a.panels);
    }
    combine_experts(o, y, a.g.out, weights, n, k, down->rows);
}
