/* Operations on rows and on elements, and the table of an instruction set. */
#include <math.h>
#include <stdatomic.h>

#include "op_args.h"
#include "simd_math.h"
#include "simd_ops.h"

enum { STRETCH = 4096, WATCHED = 1 << 16 }; /* elements per item, about; of what is only looked at */

/* ---- Rows ---- */

typedef struct rows_work {
    row_args a;
    void (*row)(const row_args *a, int64_t i);
} rows_work;

static void rows_item(void *arg, int64_t item, int32_t thread) {
    const rows_work *w = arg;
    (void)thread;
    for (int64_t i = item * w->a.block; i < least((item + 1) * w->a.block, w->a.n); i++) w->row(&w->a, i);
}

static void run_rows(const ops *o, void (*row)(const row_args *a, int64_t i), row_args a) {
    a.block = most(1, STRETCH / a.d);
    pool_run(o->pool, rows_item, &(rows_work){.a = a, .row = row}, (a.n + a.block - 1) / a.block);
}

static void scale_row(float *y, const float *x, const float *weight, int64_t d, float scale) {
    const vf by = vf_set(scale);
    for (int64_t j = 0; j < d; j += LANES) {
        const vf v = vf_mul(vf_load_first(x + j, d - j), by);
        vf_store_first(y + j, weight ? vf_mul(v, vf_load_first(weight + j, d - j)) : v, d - j);
    }
}

static void embed_row(const row_args *a, int64_t i) {
    float *y = a->y + i * a->d;
    a->table->format->decode(tensor_row(a->table, 0, a->ids[i]), y, a->d / a->table->format->block);
    scale_row(y, y, NULL, a->d, a->number);
}

void SIMD(embed)(const ops *o, float *y, const tensor *table, const int32_t *ids, int64_t n, float scale) {
    run_rows(o, embed_row, (row_args){.y = y, .table = table, .ids = ids, .n = n, .d = table->cols, .number = scale});
}

static void rms_norm_row(const row_args *a, int64_t i) {
    enum { SUMS = 4 };
    const float *x = a->x + i * a->d;
    vf sum[SUMS] = {vf_set(0.0f), vf_set(0.0f), vf_set(0.0f), vf_set(0.0f)};
    int64_t j = 0;
    for (; j + SUMS * LANES <= a->d; j += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) {
            const vf v = vf_load(x + j + s * LANES);
            sum[s] = vf_fma(v, v, sum[s]);
        }
    for (; j < a->d; j += LANES) {
        const vf v = vf_load_first(x + j, a->d - j);
        sum[0] = vf_fma(v, v, sum[0]);
    }
    const double squares = (double)vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
    scale_row(a->y + i * a->d, x, a->weight, a->d, (float)(1.0 / sqrt(squares / (double)a->d + (double)a->number)));
}

void SIMD(rms_norm)(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float eps) {
    run_rows(o, rms_norm_row, (row_args){.y = y, .x = x, .weight = weight, .n = n, .d = d, .number = eps});
}

static void mul_row(const row_args *a, int64_t i) {
    const float *x = a->x + i * a->d;
    float *y = a->y + i * a->d;
    const vf by = vf_set(a->number);
    for (int64_t j = 0; j < a->d; j += LANES) {
        const int64_t left = a->d - j;
        vf_store_first(y + j, vf_mul(vf_load_first(x + j, left), vf_mul(vf_load_first(a->weight + j, left), by)), left);
    }
}

void SIMD(mul)(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float scale) {
    run_rows(o, mul_row, (row_args){.y = y, .x = x, .weight = weight, .n = n, .d = d, .number = scale});
}

/* ---- Elements ---- */

typedef struct elements {
    float *y;
    const float *x, *other;
    int64_t n;
    float number;
} elements;

/* y[i] = f(x[i], other[i]) over a stretch, with `other` NULL read as 0; `value` is the expression for one vector. */
#define ELEMENTS(name, value)                                                             \
    static void name(void *arg, int64_t item, int32_t thread) {                           \
        const elements *a = arg;                                                          \
        const vf number = vf_set(a->number);                                              \
        const int64_t to = least((item + 1) * STRETCH, a->n);                             \
        (void)thread, (void)number;                                                       \
        for (int64_t i = item * STRETCH; i < to; i += LANES) {                            \
            const int64_t left = to - i;                                                  \
            const vf x = vf_load_first(a->x + i, left);                                   \
            const vf other = a->other ? vf_load_first(a->other + i, left) : vf_set(0.0f); \
            (void)other;                                                                  \
            vf_store_first(a->y + i, value, left);                                        \
        }                                                                                 \
    }

ELEMENTS(add_item, vf_mul(vf_add(x, other), number))
ELEMENTS(gelu_mul_item, vf_mul(vf_gelu(x), other))
/* x - x: NaN stays, and infinity becomes it */
ELEMENTS(softcap_item, vf_add(vf_mul(number, vf_tanh(vf_div(x, number))), vf_sub(x, x)))
ELEMENTS(divide_item, vf_div(x, number))

static void run_elements(const ops *o, pool_work work, elements a) {
    pool_run(o->pool, work, &a, (a.n + STRETCH - 1) / STRETCH);
}

void SIMD(add)(const ops *o, float *y, const float *x, const float *add, int64_t n, int64_t d, float scale) {
    run_elements(o, add_item, (elements){.y = y, .x = x, .other = add, .n = n * d, .number = scale});
}

void SIMD(gelu_mul)(const ops *o, float *y, const float *gate, const float *up, int64_t n) {
    run_elements(o, gelu_mul_item, (elements){.y = y, .x = gate, .other = up, .n = n, .number = 0.0f});
}

void SIMD(softcap)(const ops *o, float *x, int64_t n, float cap) {
    run_elements(o, softcap_item, (elements){.y = x, .x = x, .other = NULL, .n = n, .number = cap});
}

void SIMD(divide)(const ops *o, float *z, const float *x, int64_t n, float temperature) {
    run_elements(o, divide_item, (elements){.y = z, .x = x, .other = NULL, .n = n, .number = temperature});
}

/* ---- Watching ---- */

typedef struct watching {
    const float *x;
    int64_t n;
    atomic_bool bad;
} watching;

static void watch_item(void *arg, int64_t item, int32_t thread) {
    watching *a = arg;
    (void)thread;
    if (isnan(nothing_of(a->x + item * WATCHED, least(WATCHED, a->n - item * WATCHED)))) atomic_store(&a->bad, true);
}

void SIMD(check_finite)(const ops *o, int32_t *nonfinite, const float *x, int64_t n, int32_t mark) {
    if (*nonfinite) return;
    watching a = {.x = x, .n = n};
    pool_run(o->pool, watch_item, &a, (n + WATCHED - 1) / WATCHED);
    if (atomic_load(&a.bad)) *nonfinite = mark;
}

/* ---- Rotation ---- */

static void rope_item(void *arg, int64_t i, int32_t thread) {
    const rope_args *a = arg;
    const int64_t half = a->dim / 2;
    const vf position = vf_set((float)(a->first + i));
    (void)thread;
    for (int64_t j = 0; j < half; j += LANES) {
        const int64_t left = half - j;
        float *low = a->x + i * a->heads * a->dim + j;
        vf s, c;
        vf_sincos(vf_mul(position, vf_load_first(a->inverse_frequency + j, left)), &s, &c);
        for (int64_t h = 0; h < a->heads; h++, low += a->dim) {
            float *high = low + half;
            const vf l = vf_load_first(low, left), u = vf_load_first(high, left);
            vf_store_first(low, vf_fnma(u, s, vf_mul(l, c)), left);
            vf_store_first(high, vf_fma(l, s, vf_mul(u, c)), left);
        }
    }
}

void SIMD(rope)(const ops *o, float *x, int64_t n, int64_t heads, int64_t dim, int64_t first,
                const float *inverse_frequency) {
    pool_run(o->pool, rope_item,
             &(rope_args){.x = x, .heads = heads, .dim = dim, .first = first, .inverse_frequency = inverse_frequency},
             n);
}

/* ---- The table ---- */

void SIMD(simd_install)(ops *o) { /* route stays the reference's: its time is nothing */
    o->embed = SIMD(embed);
    o->rms_norm = SIMD(rms_norm);
    o->add = SIMD(add);
    o->mul = SIMD(mul);
    o->matmul = SIMD(matmul);
    o->gelu_mul = SIMD(gelu_mul);
    o->rope = SIMD(rope);
    o->attention = SIMD(attention);
    o->experts = SIMD(experts);
    o->check_finite = SIMD(check_finite);
    o->softcap = SIMD(softcap);
    o->divide = SIMD(divide);
    o->choose = SIMD(choose);
    o->self_condition_dense = SIMD(self_condition_dense);
}
