/* Every op that computes, in plain C: what the fast ones are tested against. Sums are taken in double, in index
 * order. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu.h"
#include "op_args.h"

static float *scratch_of(const ops *o, int32_t thread) { return o->scratch + thread * o->scratch_floats; }

static void decode_row(const tensor *t, int64_t expert, int64_t row, float *out) {
    t->format->decode(tensor_row(t, expert, row), out, t->cols / t->format->block);
}

static double dot(const float *a, const float *b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static float gelu(float x) { /* tanh form */
    const double v = (double)x;
    return (float)(0.5 * v * (1.0 + tanh(0.79788456080286535588 * (v + 0.044715 * v * v * v))));
}

/* ---- Rows ---- */

static void embed_row(void *arg, int64_t i, int32_t thread) {
    const row_args *a = arg;
    (void)thread;
    float *y = a->y + i * a->d;
    decode_row(a->table, 0, a->ids[i], y);
    for (int64_t j = 0; j < a->d; j++) y[j] *= a->number;
}

void reference_embed(const ops *o, float *y, const tensor *table, const int32_t *ids, int64_t n, float scale) {
    pool_run(o->pool, embed_row, &(row_args){.y = y, .table = table, .ids = ids, .d = table->cols, .number = scale}, n);
}

static void rms_norm_row(void *arg, int64_t i, int32_t thread) {
    const row_args *a = arg;
    (void)thread;
    const float *x = a->x + i * a->d;
    float *y = a->y + i * a->d;
    const float scale = (float)(1.0 / sqrt(dot(x, x, a->d) / (double)a->d + (double)a->number));
    for (int64_t j = 0; j < a->d; j++) y[j] = x[j] * scale * (a->weight ? a->weight[j] : 1.0f);
}

void reference_rms_norm(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float eps) {
    pool_run(o->pool, rms_norm_row, &(row_args){.y = y, .x = x, .weight = weight, .d = d, .number = eps}, n);
}

static void add_row(void *arg, int64_t i, int32_t thread) {
    const row_args *a = arg;
    (void)thread;
    for (int64_t j = i * a->d; j < (i + 1) * a->d; j++)
        a->y[j] = (a->x[j] + (a->weight ? a->weight[j] : 0.0f)) * a->number;
}

void reference_add(const ops *o, float *y, const float *x, const float *add, int64_t n, int64_t d, float scale) {
    pool_run(o->pool, add_row, &(row_args){.y = y, .x = x, .weight = add, .d = d, .number = scale}, n);
}

static void mul_row(void *arg, int64_t i, int32_t thread) {
    const row_args *a = arg;
    (void)thread;
    for (int64_t j = 0; j < a->d; j++) a->y[i * a->d + j] = a->x[i * a->d + j] * (a->weight[j] * a->number);
}

void reference_mul(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float scale) {
    pool_run(o->pool, mul_row, &(row_args){.y = y, .x = x, .weight = weight, .d = d, .number = scale}, n);
}

/* ---- Elements, in stretches ---- */

enum { STRETCH = 4096 };

typedef struct elements {
    float *y;
    const float *x, *up;
    int64_t n;
    float number;
} elements;

static int64_t stretch_end(const elements *a, int64_t item) {
    const int64_t end = (item + 1) * STRETCH;
    return end < a->n ? end : a->n;
}

static void run_elements(const ops *o, pool_work work, elements a) {
    pool_run(o->pool, work, &a, (a.n + STRETCH - 1) / STRETCH);
}

static void gelu_mul_stretch(void *arg, int64_t item, int32_t thread) {
    const elements *a = arg;
    (void)thread;
    for (int64_t i = item * STRETCH; i < stretch_end(a, item); i++) a->y[i] = gelu(a->x[i]) * a->up[i];
}

void reference_gelu_mul(const ops *o, float *y, const float *gate, const float *up, int64_t n) {
    run_elements(o, gelu_mul_stretch, (elements){.y = y, .x = gate, .up = up, .n = n});
}

static void softcap_stretch(void *arg, int64_t item, int32_t thread) {
    const elements *a = arg;
    (void)thread;
    for (int64_t i = item * STRETCH; i < stretch_end(a, item); i++)
        a->y[i] = a->number * tanhf(a->y[i] / a->number) + (a->y[i] - a->y[i]);
}

void reference_softcap(const ops *o, float *x, int64_t n, float cap) {
    run_elements(o, softcap_stretch, (elements){.y = x, .n = n, .number = cap});
}

static void divide_stretch(void *arg, int64_t item, int32_t thread) {
    const elements *a = arg;
    (void)thread;
    for (int64_t i = item * STRETCH; i < stretch_end(a, item); i++) a->y[i] = a->x[i] / a->number;
}

void reference_divide(const ops *o, float *z, const float *x, int64_t n, float temperature) {
    run_elements(o, divide_stretch, (elements){.y = z, .x = x, .n = n, .number = temperature});
}

typedef struct watching {
    const float *x;
    int64_t n;
    atomic_bool bad;
} watching;

static void watch_stretch(void *arg, int64_t item, int32_t thread) {
    watching *a = arg;
    const int64_t end = (item + 1) * STRETCH < a->n ? (item + 1) * STRETCH : a->n;
    bool finite = true;
    (void)thread;
    for (int64_t i = item * STRETCH; i < end; i++) finite = finite && isfinite(a->x[i]);
    if (!finite) atomic_store(&a->bad, true);
}

void reference_check_finite(const ops *o, int32_t *nonfinite, const float *x, int64_t n, int32_t mark) {
    if (*nonfinite) return;
    watching a = {.x = x, .n = n};
    pool_run(o->pool, watch_stretch, &a, (n + STRETCH - 1) / STRETCH);
    if (atomic_load(&a.bad)) *nonfinite = mark;
}

/* ---- Matrices ---- */

typedef struct product {
    const ops *o;
    float *y;
    const float *x;
    const tensor *w;
    int64_t n;
} product;

static void matmul_row(void *arg, int64_t row, int32_t thread) {
    const product *a = arg;
    float *w = scratch_of(a->o, thread);
    decode_row(a->w, 0, row, w);
    for (int64_t i = 0; i < a->n; i++) a->y[i * a->w->rows + row] = (float)dot(a->x + i * a->w->cols, w, a->w->cols);
}

void reference_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    (void)work;
    pool_run(o->pool, matmul_row, &(product){.o = o, .y = y, .x = x, .w = w, .n = n}, w->rows);
}

/* ---- Attention ---- */

static void rope_row(void *arg, int64_t i, int32_t thread) {
    const rope_args *a = arg;
    const int64_t half = a->dim / 2;
    (void)thread;
    for (int64_t j = 0; j < half; j++) {
        const float angle = (float)(a->first + i) * a->inverse_frequency[j]; /* rounded to float32, as in training */
        const float c = cosf(angle), s = sinf(angle);
        for (int64_t h = 0; h < a->heads; h++) {
            float *low = a->x + (i * a->heads + h) * a->dim + j, *high = low + half;
            const float l = *low, u = *high;
            *low = l * c - u * s;
            *high = u * c + l * s;
        }
    }
}

void reference_rope(const ops *o, float *x, int64_t n, int64_t heads, int64_t dim, int64_t first,
                    const float *inverse_frequency) {
    pool_run(o->pool, rope_row,
             &(rope_args){.x = x, .heads = heads, .dim = dim, .first = first, .inverse_frequency = inverse_frequency},
             n);
}

typedef struct attending {
    const ops *o;
    float *y;
    const float *q;
    const attention_keys *keys;
    int64_t n_head, dim;
} attending;

static void attention_item(void *arg, int64_t item, int32_t thread) {
    const attending *a = arg;
    const attention_keys *s = a->keys;
    const int64_t i = item / a->n_head, h = item % a->n_head, kv = h * s->n_kv / a->n_head;
    const float *q = a->q + item * a->dim;
    double *sum = (double *)(void *)scratch_of(a->o, thread), total = 0.0, peak = -INFINITY;
    int64_t from, to;
    attention_span(s, i, &from, &to);
    for (int64_t d = 0; d < a->dim; d++) sum[d] = 0.0;
    for (int64_t j = from; j < to; j++) { /* softmax as it goes: a new peak scales down what was summed before */
        const float *k = (const float *)s->k + (j * s->n_kv + kv) * a->dim,
                    *v = (const float *)s->v + (j * s->n_kv + kv) * a->dim;
        const double score = dot(q, k, a->dim);
        if (score > peak) {
            const double shrink = exp(peak - score);
            for (int64_t d = 0; d < a->dim; d++) sum[d] *= shrink;
            total *= shrink;
            peak = score;
        }
        const double p = exp(score - peak);
        for (int64_t d = 0; d < a->dim; d++) sum[d] += p * (double)v[d];
        total += p;
    }
    for (int64_t d = 0; d < a->dim; d++) a->y[item * a->dim + d] = (float)(sum[d] / total);
}

void reference_attention(const ops *o, float *y, const float *q, const attention_keys *keys, int64_t n, int64_t n_head,
                         int64_t dim) {
    pool_run(o->pool, attention_item, &(attending){.o = o, .y = y, .q = q, .keys = keys, .n_head = n_head, .dim = dim},
             n * n_head);
}

/* ---- Experts ---- */

typedef struct mixture {
    const ops *o;
    const float *x;
    const tensor *gate, *up, *down;
    expert_groups g;
    int64_t k;
} mixture;

static void expert_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int32_t e = a->g.list[item];
    const int64_t d = a->gate->cols, d_expert = a->gate->rows;
    float *one = scratch_of(a->o, thread), *other = one + d;
    const int32_t from = a->g.start[e], to = a->g.start[e + 1];
    if (from == to) return;
    for (int64_t r = 0; r < d_expert; r++) {
        decode_row(a->gate, e, r, one);
        decode_row(a->up, e, r, other);
        for (int32_t p = from; p < to; p++) {
            const float *x = a->x + a->g.pairs[p] / a->k * d;
            a->g.hidden[p * d_expert + r] = gelu((float)dot(x, one, d)) * (float)dot(x, other, d);
        }
    }
    for (int64_t r = 0; r < a->down->rows; r++) {
        decode_row(a->down, e, r, one);
        for (int32_t p = from; p < to; p++)
            a->g.out[a->g.pairs[p] * a->down->rows + r] = (float)dot(a->g.hidden + p * d_expert, one, d_expert);
    }
}

void reference_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                       const int32_t *experts, const float *weights, int64_t n, int64_t k, const expert_feed *feed,
                       void *work) {
    mixture a = {.o = o, .x = x, .gate = gate, .up = up, .down = down, .k = k};
    a.g = group_by_expert(work, experts, n, k, gate->cols, gate->rows, gate->experts);
    for (int32_t count; (count = next_experts(feed, &a.g)) > 0;) pool_run(o->pool, expert_item, &a, count);
    combine_experts(o, y, a.g.out, weights, n, k, down->rows);
}

/* ---- Vocabulary ---- */

static void choose_row(void *arg, int64_t i, int32_t thread) {
    const choose_args *a = arg;
    (void)thread;
    dg_choose(a->z + i * a->n_vocab, 1, a->n_vocab, a->u + i, a->out + i);
}

void reference_choose(const ops *o, dg_choice *out, const float *z, int64_t n, int64_t n_vocab, const double *u) {
    pool_run(o->pool, choose_row, &(choose_args){.out = out, .z = z, .n_vocab = n_vocab, .u = u}, n);
}

typedef struct conditioning {
    const ops *o;
    float *y;
    const float *z;
    const tensor *table;
    float scale;
} conditioning;

static void condition_row(void *arg, int64_t i, int32_t thread) {
    const conditioning *a = arg;
    const int64_t n_vocab = a->table->rows, d = a->table->cols;
    const float *z = a->z + i * n_vocab;
    float *row = scratch_of(a->o, thread);
    double *sum = (double *)(void *)(row + (d + 1) / 2 * 2), peak = -INFINITY, total = 0.0;
    for (int64_t v = 0; v < n_vocab; v++) peak = (double)z[v] > peak ? (double)z[v] : peak;
    for (int64_t j = 0; j < d; j++) sum[j] = 0.0;
    for (int64_t v = 0; v < n_vocab; v++) {
        const double p = exp((double)z[v] - peak);
        decode_row(a->table, 0, v, row);
        for (int64_t j = 0; j < d; j++) sum[j] += p * (double)row[j];
        total += p;
    }
    for (int64_t j = 0; j < d; j++) a->y[i * d + j] = (float)(sum[j] / total) * a->scale;
}

void reference_self_condition_dense(const ops *o, float *y, const float *z, const tensor *table, int64_t n, float scale,
                                    float *work) {
    (void)work;
    pool_run(o->pool, condition_row, &(conditioning){.o = o, .y = y, .z = z, .table = table, .scale = scale}, n);
}

void reference_logits(const ops *o, float *y, const float *x, const tensor *table, int64_t n, float cap,
                      int32_t *nonfinite, int32_t mark, void *work, float *scratch) {
    (void)scratch;
    o->matmul(o, y, x, table, n, work);
    o->check_finite(o, nonfinite, y, n * table->rows, mark);
    o->softcap(o, y, n * table->rows, cap);
}

/* ---- A step's end and the next one's beginning, made of the ops above ---- */

void reference_head(const ops *o, const head_part *parts, int32_t n_parts, const float *x, const tensor *table,
                    int64_t n, float cap, void *work) {
    (void)n;
    for (const head_part *p = parts; p < parts + n_parts; p++) {
        float *z = p->next->z;
        o->matmul(o, z, x, table, p->n, work);
        o->softcap(o, z, p->n * table->rows, cap);
        o->divide(o, z, z, p->n * table->rows, *p->temperature);
        o->choose(o, p->out, z, p->n, table->rows, p->u);
        p->next->started = true;
        x += p->n * table->cols;
    }
}

void reference_self_condition(const ops *o, float *y, const self_cond *s, const tensor *table, int64_t n, float scale,
                              void *work, float *scratch) {
    (void)work;
    o->self_condition_dense(o, y, s->z, table, n, scale, scratch);
    for (int64_t i = 0; s->pinned && i < n; i++)
        if (s->pinned[i] && s->given) o->embed(o, y + i * table->cols, table, &s->given[i], 1, scale);
        else if (s->pinned[i]) memset(y + i * table->cols, 0, (size_t)table->cols * sizeof *y);
}
