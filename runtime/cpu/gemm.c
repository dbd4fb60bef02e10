/* The order of an integer product, the same for every instruction set: panel of rows, column block, unpack, tokens. */
#include "gemm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "carve.h"

enum {
    STRIPS = 4,    /* strips of GEMM_ROWS rows that a thread computes at a time */
    AHEAD = 2,     /* column blocks between the prefetch of weights and their use */
    TOGETHER = 16, /* rows whose scales share a cache line: one thread rounds them all */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

const gemm_kernel *gemm_kernel_for(const gemm_set *set, const tensor *w) {
    for (int32_t i = 0; i < set->n_kernels; i++)
        if (set->kernels[i].format == w->format->id) return w->cols % GEMM_SUB ? NULL : &set->kernels[i];
    return NULL;
}

/* Columns of a panel: a K-quant's block, else as many whole blocks as divide the row and fit. */
static int64_t depth_of(const gemm_kernel *k, int64_t cols) {
    if (k->k_quant) return 256;
    const int64_t block = dg_format_find(k->format)->block;
    int64_t depth = GEMM_DEPTH / block * block;
    while (cols % depth) depth -= block;
    return depth;
}

/* ---- Activations ---- */

static gemm_input lay_out(const gemm_kernel *k, int64_t n, int64_t cols, char **work) {
    gemm_input x = {.n = n, .cols = cols, .depth = depth_of(k, cols), .wide = k->wide};
    x.step = k->k_quant ? x.depth : x.depth % 64 ? 32 : 64;
    x.codes = carve_off(work, n * cols, k->wide ? 2 : 1);
    x.scales = carve_off(work, n * cols / x.step, sizeof(float));
    x.sums = carve_off(work, n * cols / 32, sizeof(float));
    x.sums16 = carve_off(work, n * cols / 32, sizeof(int16_t));
    x.start16 = carve_off(work, n * cols / 16, sizeof(int32_t));
    x.start32 = carve_off(work, n * cols / 32, sizeof(int32_t));
    return x;
}

typedef struct rounding {
    const gemm_set *set;
    const gemm_input *x;
    const float *values;
} rounding;

static void quantise_row(const rounding *a, int64_t i) {
    for (int64_t b = 0; b < a->x->cols / a->x->depth; b++)
        a->set->quantise(a->x, b, i, a->values + i * a->x->cols + b * a->x->depth);
}

static void quantise_some(void *arg, int64_t item, int32_t thread) {
    const rounding *a = arg;
    (void)thread;
    for (int64_t i = item * TOGETHER; i < least((item + 1) * TOGETHER, a->x->n); i++) quantise_row(a, i);
}

gemm_input gemm_quantise(const ops *o, const gemm_kernel *k, const float *values, int64_t n, int64_t cols,
                         char **work) {
    const gemm_input x = lay_out(k, n, cols, work);
    pool_run(o->pool, quantise_some, &(rounding){.set = o->gemm, .x = &x, .values = values},
             (n + TOGETHER - 1) / TOGETHER);
    return x;
}

/* ---- Panels ---- */

/* The addresses of a strip's rows: one for each row or, repacked, one for `together` rows. */
typedef struct sources {
    const uint8_t *rows[GEMM_ROWS];
    int64_t count, together;
} sources;

static sources sources_of(const gemm_strip *s) {
    const bool repacked = s->expert < s->w->n_repacked;
    sources from; /* not cleared: this is called for every panel */
    from.count = repacked ? GEMM_ROWS / GEMM_REPACKED : GEMM_ROWS;
    from.together = repacked ? GEMM_REPACKED : 1;
    for (int64_t i = 0; i < from.count; i++) {
        const int64_t row = s->row + i * from.together;
        from.rows[i] = repacked ? s->w->repacked + (s->expert * gemm_padded(s->w->rows) + row) * s->w->row_bytes
                                : tensor_row(s->w, s->expert, least(row, s->w->rows - 1));
    }
    return from;
}

/* Prefetches one column block of a strip, for the first or the second half of its rows. More prefetches at once than
 * the processor can track would stall the computation. */
static void prefetch(const sources *from, int64_t at, int64_t bytes, int half) {
    for (int64_t r = half * from->count / 2; r < (half + 1) * from->count / 2; r++)
        for (int64_t i = 0; i < bytes * from->together; i += 64)
            __builtin_prefetch(from->rows[r] + at * from->together + i, 0, 2); /* into L2: the panel fills L1 */
}

void gemm_product(const gemm_kernel *k, gemm_panel *p, const gemm_strip *s, const gemm_strip *next, const gemm_input *x,
                  const int32_t *tokens, int64_t n, float *acc) {
    const int64_t blocks = s->w->cols / x->depth, bytes = s->w->row_bytes / blocks, ahead = least(AHEAD, blocks);
    const sources from = sources_of(s), later = next ? sources_of(next) : from;
    p->depth = x->depth;
    memset(acc, 0, (size_t)n * GEMM_ROWS * sizeof *acc);
    for (int64_t b = 0; b < blocks; b++) {
        const sources *then = b + ahead < blocks ? &from : &later;
        const int64_t at = (b + ahead < blocks ? b + ahead : b + ahead - blocks) * bytes,
                      ask = then == &from || next ? bytes : 0;
        prefetch(then, at, ask, 0);
        (from.together > 1 ? k->unpack_repacked : k->unpack)(p, from.rows, b);
        prefetch(then, at, ask, 1);
        k->multiply(p, x, b, tokens, n, acc);
    }
}

/* Copies the sums of a panel's rows to y; at the end of a matrix there are fewer than GEMM_ROWS. */
static void put(float *y, const float *acc, int64_t rows) {
    if (rows >= GEMM_ROWS) memcpy(y, acc, GEMM_ROWS * sizeof *y); /* a constant size: a few moves */
    else memcpy(y, acc, (size_t)rows * sizeof *y);
}

gemm_scratch gemm_scratch_for(const ops *o, int32_t thread) {
    float *at = o->scratch + thread * o->scratch_floats;
    gemm_panel *panel = (gemm_panel *)(void *)at;
    at += (sizeof *panel + 63) / 64 * 64 / sizeof(float);
    return (gemm_scratch){
        .panel = panel, .acc = at, .other = at + GEMM_TOKENS * GEMM_ROWS, .tile = at + 2 * GEMM_TOKENS * GEMM_ROWS};
}

/* ---- matmul ---- */

typedef struct multiplying {
    const ops *o;
    const gemm_kernel *k;
    float *y;
    const tensor *w;
    gemm_input x;
} multiplying;

static void matmul_item(void *arg, int64_t item, int32_t thread) {
    const multiplying *a = arg;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int64_t end = least((item + 1) * STRIPS * GEMM_ROWS, a->w->rows);
    for (int64_t from = 0; from < a->x.n; from += GEMM_TOKENS) {
        const int64_t n = least(GEMM_TOKENS, a->x.n - from);
        int32_t some[GEMM_TOKENS], *tokens = NULL;
        if (from) {
            tokens = some;
            for (int64_t i = 0; i < n; i++) some[i] = (int32_t)(from + i);
        }
        for (int64_t row = item * STRIPS * GEMM_ROWS; row < end; row += GEMM_ROWS) {
            const gemm_strip s = {.w = a->w, .row = row}, next = {.w = a->w, .row = row + GEMM_ROWS};
            gemm_product(a->k, r.panel, &s, next.row < end ? &next : NULL, &a->x, tokens, n, r.acc);
            for (int64_t i = 0; i < n; i++) put(a->y + (from + i) * a->w->rows + row, r.acc + i * GEMM_ROWS, end - row);
        }
    }
}

static int64_t items_of(int64_t rows) { return (rows + STRIPS * GEMM_ROWS - 1) / (STRIPS * GEMM_ROWS); }

void gemm_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    const gemm_kernel *k = gemm_kernel_for(o->gemm, w);
    if (!k) {
        o->float_matmul(o, y, x, w, n, work);
        return;
    }
    char *at = work;
    const multiplying a = {.o = o, .k = k, .y = y, .w = w, .x = gemm_quantise(o, k, x, n, w->cols, &at)};
    pool_run(o->pool, matmul_item, (void *)(uintptr_t)&a, items_of(w->rows));
}

/* ---- experts ---- */

typedef struct mixture {
    const ops *o;
    const gemm_kernel *k, *k_down;
    const tensor *gate, *up, *down;
    expert_groups g;
    int32_t *tokens; /* [n * k] of each place in g.pairs */
    gemm_input x, hidden;
    int64_t items; /* per expert */
} mixture;

static void gate_up_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int64_t e = a->g.list[item / a->items], begin = item % a->items * STRIPS * GEMM_ROWS,
                  end = least(begin + STRIPS * GEMM_ROWS, a->gate->rows);
    for (int64_t from = a->g.start[e]; from < a->g.start[e + 1]; from += GEMM_TOKENS) {
        const int64_t n = least(GEMM_TOKENS, a->g.start[e + 1] - from);
        for (int64_t row = begin; row < end; row += GEMM_ROWS) {
            const gemm_strip gate = {.w = a->gate, .expert = e, .row = row}, up = {.w = a->up, .expert = e, .row = row},
                             next = {.w = a->gate, .expert = e, .row = row + GEMM_ROWS};
            gemm_product(a->k, r.panel, &gate, &up, &a->x, a->tokens + from, n, r.acc);
            gemm_product(a->k, r.panel, &up, next.row < end ? &next : NULL, &a->x, a->tokens + from, n, r.other);
            a->o->gemm->gelu_mul(r.acc, r.acc, r.other, n * GEMM_ROWS);
            for (int64_t i = 0; i < n; i++)
                put(a->g.hidden + (from + i) * a->gate->rows + row, r.acc + i * GEMM_ROWS, end - row);
        }
    }
}

static void down_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int64_t e = a->g.list[item / a->items], begin = item % a->items * STRIPS * GEMM_ROWS,
                  end = least(begin + STRIPS * GEMM_ROWS, a->down->rows);
    for (int64_t from = a->g.start[e]; from < a->g.start[e + 1]; from += GEMM_TOKENS) {
        const int64_t n = least(GEMM_TOKENS, a->g.start[e + 1] - from);
        int32_t places[GEMM_TOKENS];
        for (int64_t i = 0; i < n; i++) places[i] = (int32_t)(from + i);
        for (int64_t row = begin; row < end; row += GEMM_ROWS) {
            const gemm_strip s = {.w = a->down, .expert = e, .row = row},
                             next = {.w = a->down, .expert = e, .row = row + GEMM_ROWS};
            gemm_product(a->k_down, r.panel, &s, next.row < end ? &next : NULL, &a->hidden, places, n, r.acc);
            for (int64_t i = 0; i < n; i++)
                put(a->g.out + a->g.pairs[from + i] * a->down->rows + row, r.acc + i * GEMM_ROWS, end - row);
        }
    }
}

/* Rounds the hidden values of one expert. */
static void quantise_hidden(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = a->g.list[item];
    (void)thread;
    const rounding r = {.set = a->o->gemm, .x = &a->hidden, .values = a->g.hidden};
    for (int64_t i = a->g.start[e]; i < a->g.start[e + 1]; i++) quantise_row(&r, i);
}

void gemm_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                  const int32_t *experts, const float *weights, int64_t n, int64_t k, const expert_feed *feed,
                  void *work) {
    const gemm_kernel *k_in = gemm_kernel_for(o->gemm, gate), *k_down = gemm_kernel_for(o->gemm, down);
    if (!k_in || !k_down || k_in != gemm_kernel_for(o->gemm, up)) {
        o->float_experts(o, y, x, gate, up, down, experts, weights, n, k, feed, work);
        return;
    }
    mixture a = {.o = o, .k = k_in, .k_down = k_down, .gate = gate, .up = up, .down = down};
    a.g = group_by_expert(work, experts, n, k, down->rows, gate->rows, gate->experts);
    char *at = a.g.rest;
    a.tokens = carve_off(&at, n * k, sizeof *a.tokens);
    for (int64_t p = 0; p < n * k; p++) a.tokens[p] = a.g.pairs[p] / (int32_t)k;
    a.x = gemm_quantise(o, k_in, x, n, gate->cols, &at);
    a.hidden = lay_out(k_down, n * k, down->cols, &at);
    for (int32_t count; (count = next_experts(feed, &a.g)) > 0;) {
        a.items = items_of(gate->rows);
        pool_run(o->pool, gate_up_item, &a, count * a.items);
        pool_run(o->pool, quantise_hidden, &a, count);
        a.items = items_of(down->rows);
        pool_run(o->pool, down_item, &a, count * a.items);
    }
    combine_experts(o, y, a.g.out, weights, n, k, down->rows);
}
