/* AVX2 and FMA: float32 throughout, weights decoded a panel of rows at a time. */
#include "cpu.h"

#if !defined(__AVX2__) || !defined(__FMA__)

const char *cpu_avx2_install(ops *o) {
    (void)o;
    return NULL;
}

#else

#include <math.h>

#include "avx2_math.h"

enum {
    PANEL = 8,       /* weight rows decoded together */
    DEPTH = 704,     /* columns of a panel that stay in L1 while the tokens pass */
    TILE = 3,        /* tokens that share a load of the weights */
    KEYS = 64,       /* keys per block of attention, at positions that are multiples of it */
    QUERIES = 4,     /* queries of one head that share a load of the keys */
    WORDS = 32,      /* vocabulary rows per block of self-conditioning */
    COLUMNS = 256,   /* and columns */
    CHUNK = 1024,    /* vocabulary per partial sum of a choice */
    STRETCH = 4096,  /* elements per item of an elementwise op */
};

static float *scratch_of(const ops *o, int32_t thread) { return o->scratch + thread * o->scratch_floats; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Matrices ---- */

/* y[t][0..4) += x[t] . w[r] over columns [from, to), for 4 rows and `tokens` (1 to 3) tokens. Each output sums in the
 * same order whatever tokens it shares the tile with. */
static inline __attribute__((always_inline)) void tile(const float *w, int64_t ld, const float *const *x, float *const *y, int tokens, int64_t from,
                                                       int64_t to, bool first) {
    __m256 sum[TILE][4];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < 4; r++) sum[t][r] = _mm256_setzero_ps();
    int64_t j = from;
    for (; j + 8 <= to; j += 8) {
        __m256 v[TILE];
        for (int t = 0; t < tokens; t++) v[t] = _mm256_loadu_ps(x[t] + j);
        for (int r = 0; r < 4; r++) {
            const __m256 row = _mm256_load_ps(w + r * ld + j);
            for (int t = 0; t < tokens; t++) sum[t][r] = _mm256_fmadd_ps(row, v[t], sum[t][r]);
        }
    }
    if (j < to) {
        const __m256i mask = first_lanes(to - j);
        for (int t = 0; t < tokens; t++) {
            const __m256 v = _mm256_maskload_ps(x[t] + j, mask);
            for (int r = 0; r < 4; r++) sum[t][r] = _mm256_fmadd_ps(_mm256_maskload_ps(w + r * ld + j, mask), v, sum[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        __m128 out = sum4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        if (!first) out = _mm_add_ps(out, _mm_loadu_ps(y[t]));
        _mm_storeu_ps(y[t], out);
    }
}

/* Decodes rows [row, row + PANEL) of an expert to float32, `ld` floats apart; rows past the end become zeros. */
static void decode_panel(const tensor *t, int64_t expert, int64_t row, float *panel, int64_t ld) {
    for (int64_t r = 0; r < PANEL; r++) {
        if (row + r < t->rows) t->format->decode(tensor_row(t, expert, row + r), panel + r * ld, t->cols / t->format->block);
        else for (int64_t j = 0; j < t->cols; j++) panel[r * ld + j] = 0.0f;
    }
}

static int64_t panel_stride(const tensor *t) { return (t->cols + 7) / 8 * 8; }

/* Where a product's n tokens lie, and where their outputs for the panel's rows go. */
typedef struct strided {
    const float *x;
    float *y;
    int64_t x_row, y_row;
    const int32_t *x_at, *y_at; /* NULL: row i */
    int64_t x_divide;           /* x row = x_at[i] / x_divide */
} strided;

/* y[i][0 .. rows) = x[i] . W over the decoded panel that begins at `row`, for n tokens. */
static void panel_product(const tensor *w, int64_t row, const float *panel, int64_t n, const strided *s) {
    const int64_t ld = panel_stride(w), rows = least(PANEL, w->rows - row);
    for (int64_t from = 0; from < w->cols; from += DEPTH) {
        const int64_t to = least(from + DEPTH, w->cols);
        for (int64_t i = 0; i < n; i += TILE) {
            const int tokens = (int)least(TILE, n - i);
            const float *x[TILE];
            float *y[TILE];
            for (int t = 0; t < tokens; t++) {
                x[t] = s->x + (s->x_at ? s->x_at[i + t] / s->x_divide : i + t) * s->x_row;
                y[t] = s->y + (s->y_at ? s->y_at[i + t] : i + t) * s->y_row;
            }
            for (int64_t r = 0; r < rows; r += 4) {
                float edge[TILE][4] = {{0}}, *out[TILE]; /* fewer than 4 rows left: through a buffer, so as not to write past them */
                const int64_t left = least(4, rows - r);
                for (int t = 0; t < tokens; t++) {
                    out[t] = left == 4 ? y[t] + r : edge[t];
                    if (left < 4 && from > 0)
                        for (int64_t k = 0; k < left; k++) edge[t][k] = y[t][r + k];
                }
                if (tokens == 3) tile(panel + r * ld, ld, x, out, 3, from, to, from == 0);
                else if (tokens == 2) tile(panel + r * ld, ld, x, out, 2, from, to, from == 0);
                else tile(panel + r * ld, ld, x, out, 1, from, to, from == 0);
                for (int t = 0; t < tokens && left < 4; t++)
                    for (int64_t k = 0; k < left; k++) y[t][r + k] = edge[t][k];
            }
        }
    }
}

typedef struct product {
    const ops *o;
    const tensor *w;
    int64_t n;
    strided s;
} product;

static void matmul_item(void *arg, int64_t item, int32_t thread) {
    const product *a = arg;
    float *panel = scratch_of(a->o, thread);
    decode_panel(a->w, 0, item * PANEL, panel, panel_stride(a->w));
    strided s = a->s;
    s.y += item * PANEL;
    panel_product(a->w, item * PANEL, panel, a->n, &s);
}

static void avx2_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    (void)work;
    product a = {o, w, n, {.x = x, .y = y, .x_row = w->cols, .y_row = w->rows}};
    pool_run(o->pool, matmul_item, &a, (w->rows + PANEL - 1) / PANEL);
}

/* ---- Elements ---- */

typedef struct elements {
    float *y;
    const float *x, *up;
    int64_t n;
    float number;
} elements;

static void gelu_mul_range(float *y, const float *x, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_mul_ps(gelu8(_mm256_loadu_ps(x + i)), _mm256_loadu_ps(up + i)));
    if (i < n) {
        const __m256i mask = first_lanes(n - i);
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(gelu8(_mm256_maskload_ps(x + i, mask)), _mm256_maskload_ps(up + i, mask)));
    }
}

static void gelu_mul_item(void *arg, int64_t item, int32_t thread) {
    const elements *a = arg;
    const int64_t from = item * STRETCH;
    (void)thread;
    gelu_mul_range(a->y + from, a->x + from, a->up + from, least(STRETCH, a->n - from));
}

static void avx2_gelu_mul(const ops *o, float *y, const float *gate, const float *up, int64_t n) {
    pool_run(o->pool, gelu_mul_item, &(elements){y, gate, up, n, 0.0f}, (n + STRETCH - 1) / STRETCH);
}

static void softcap_item(void *arg, int64_t item, int32_t thread) {
    const elements *a = arg;
    const int64_t from = item * STRETCH, to = least(from + STRETCH, a->n);
    const __m256 cap = _mm256_set1_ps(a->number);
    (void)thread;
    for (int64_t i = from; i < to; i += 8) {
        const __m256i mask = first_lanes(to - i);
        const __m256 x = _mm256_maskload_ps(a->y + i, mask);
        _mm256_maskstore_ps(a->y + i, mask, _mm256_mul_ps(cap, tanh8(_mm256_div_ps(x, cap))));
    }
}

static void avx2_softcap(const ops *o, float *x, int64_t n, float cap) {
    pool_run(o->pool, softcap_item, &(elements){x, x, NULL, n, cap}, (n + STRETCH - 1) / STRETCH);
}

/* ---- Experts ---- */

typedef struct mixture {
    const ops *o;
    const tensor *gate, *up, *down;
    const float *x;
    expert_groups g;
    int64_t k;
    int64_t panels; /* per expert */
} mixture;

/* Gate and up of one panel of an expert's rows, straight to the activated hidden values. */
static void gate_up_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = item / a->panels, row = item % a->panels * PANEL, from = a->g.start[e], n = a->g.start[e + 1] - from;
    if (n == 0) return;
    const int64_t d_expert = a->gate->rows, rows = least(PANEL, d_expert - row), ld = panel_stride(a->gate);
    float *panel = scratch_of(a->o, thread), *up = panel + PANEL * ld;
    float *hidden = a->g.hidden + from * d_expert;
    enum { BATCH = 48 };
    for (int64_t i = 0; i < n; i += BATCH) {
        float ups[BATCH * PANEL];
        const int64_t batch = least(BATCH, n - i);
        const strided s = {.x = a->x, .x_row = a->gate->cols, .x_at = a->g.pairs + from + i, .x_divide = a->k};
        strided g = s, u = s;
        g.y = hidden + i * d_expert + row, g.y_row = d_expert;
        u.y = ups, u.y_row = PANEL;
        if (i == 0) {
            decode_panel(a->gate, e, row, panel, ld);
            decode_panel(a->up, e, row, up, ld);
        }
        panel_product(a->gate, row, panel, batch, &g);
        panel_product(a->up, row, up, batch, &u);
        for (int64_t t = 0; t < batch; t++) gelu_mul_range(g.y + t * d_expert, g.y + t * d_expert, ups + t * PANEL, rows);
    }
}

static void down_item(void *arg, int64_t item, int32_t thread) {
    const mixture *a = arg;
    const int64_t e = item / a->panels, row = item % a->panels * PANEL, from = a->g.start[e], n = a->g.start[e + 1] - from;
    if (n == 0) return;
    float *panel = scratch_of(a->o, thread);
    decode_panel(a->down, e, row, panel, panel_stride(a->down));
    const strided s = {
        .x = a->g.hidden + from * a->down->cols, .x_row = a->down->cols,
        .y = a->g.out + row, .y_row = a->down->rows, .y_at = a->g.pairs + from,
    };
    panel_product(a->down, row, panel, n, &s);
}

static void avx2_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down, const int32_t *experts,
                         const float *weights, int64_t n, int64_t k, void *work) {
    mixture a = {o, gate, up, down, x, group_by_expert(work, experts, n, k, gate->cols, gate->rows, gate->experts), k, 0};
    a.panels = (gate->rows + PANEL - 1) / PANEL;
    pool_run(o->pool, gate_up_item, &a, gate->experts * a.panels);
    a.panels = (down->rows + PANEL - 1) / PANEL;
    pool_run(o->pool, down_item, &a, gate->experts * a.panels);
    combine_experts(o, y, a.g.out, weights, n, k, down->rows);
}

/* ---- Attention ---- */

typedef struct attending {
    const ops *o;
    float *y;
    const float *q;
    const attention_keys *keys;
    int64_t n, n_head, dim;
} attending;

/* Scores of up to QUERIES queries against one key. */
static inline __m128 scores_of(const float *const *q, const float *k, int64_t dim) {
    __m256 sum[QUERIES];
    for (int t = 0; t < QUERIES; t++) sum[t] = _mm256_setzero_ps();
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
        const __m256 v = _mm256_loadu_ps(k + d);
        for (int t = 0; t < QUERIES; t++) sum[t] = _mm256_fmadd_ps(v, _mm256_loadu_ps(q[t] + d), sum[t]);
    }
    if (d < dim) {
        const __m256i mask = first_lanes(dim - d);
        const __m256 v = _mm256_maskload_ps(k + d, mask);
        for (int t = 0; t < QUERIES; t++) sum[t] = _mm256_fmadd_ps(v, _mm256_maskload_ps(q[t] + d, mask), sum[t]);
    }
    return sum4(sum[0], sum[1], sum[2], sum[3]);
}

/* Softmax block by block: a block with a new peak scales down what was summed before. Blocks lie at fixed positions, so
 * that a query's result does not depend on which others it is computed with. */
static void attention_item(void *arg, int64_t item, int32_t thread) {
    const attending *a = arg;
    const attention_keys *s = a->keys;
    const int64_t h = item % a->n_head, i0 = item / a->n_head * QUERIES, kv = h * s->n_kv / a->n_head, dim = a->dim;
    const int64_t queries = least(QUERIES, a->n - i0), ld = (dim + 7) / 8 * 8;
    float *sums = scratch_of(a->o, thread), p[QUERIES][KEYS], peak[QUERIES], total[QUERIES];
    const float *q[QUERIES];
    int64_t from[QUERIES], to[QUERIES], lowest = INT64_MAX, highest = 0;
    for (int64_t t = 0; t < QUERIES; t++) { /* a missing query repeats the last one */
        const int64_t i = i0 + least(t, queries - 1);
        q[t] = a->q + (i * a->n_head + h) * dim;
        attention_span(s, i, &from[t], &to[t]);
        lowest = least(lowest, from[t]);
        if (to[t] > highest) highest = to[t];
        peak[t] = -INFINITY;
        total[t] = 0.0f;
    }
    for (int64_t d = 0; d < QUERIES * ld; d++) sums[d] = 0.0f;
    for (int64_t block = lowest / KEYS * KEYS; block < highest; block += KEYS) {
        const int64_t j0 = block > lowest ? block : lowest, j1 = least(block + KEYS, highest);
        const float *k = s->k + (j0 * s->n_kv + kv) * dim, *v = s->v + (j0 * s->n_kv + kv) * dim;
        const int64_t row = s->n_kv * dim, count = j1 - j0;
        float best[QUERIES] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        for (int64_t j = 0; j < count; j++) {
            float four[4];
            _mm_storeu_ps(four, scores_of(q, k + j * row, dim));
            for (int t = 0; t < QUERIES; t++) {
                const bool seen = j0 + j >= from[t] && j0 + j < to[t];
                p[t][j] = seen ? four[t] : -INFINITY;
                if (p[t][j] > best[t]) best[t] = p[t][j];
            }
        }
        for (int t = 0; t < QUERIES; t++) {
            const float next = best[t] > peak[t] ? best[t] : peak[t];
            if (next == -INFINITY) { /* nothing seen yet */
                for (int64_t j = 0; j < count; j++) p[t][j] = 0.0f;
                continue;
            }
            if (next > peak[t]) {
                const float shrink = expf(peak[t] - next);
                for (int64_t d = 0; d < dim; d++) sums[t * ld + d] *= shrink;
                total[t] *= shrink;
                peak[t] = next;
            }
            for (int64_t j = count; j < (count + 7) / 8 * 8; j++) p[t][j] = -INFINITY;
            for (int64_t j = 0; j < count; j += 8) _mm256_storeu_ps(p[t] + j, exp8(_mm256_sub_ps(_mm256_loadu_ps(p[t] + j), _mm256_set1_ps(peak[t]))));
            for (int64_t j = 0; j < count; j++) total[t] += p[t][j];
        }
        for (int64_t d = 0; d < dim; d += 8) {
            const __m256i mask = first_lanes(dim - d);
            __m256 sum[QUERIES];
            for (int t = 0; t < QUERIES; t++) sum[t] = _mm256_loadu_ps(sums + t * ld + d);
            for (int64_t j = 0; j < count; j++) {
                const __m256 value = dim - d >= 8 ? _mm256_loadu_ps(v + j * row + d) : _mm256_maskload_ps(v + j * row + d, mask);
                for (int t = 0; t < QUERIES; t++) sum[t] = _mm256_fmadd_ps(_mm256_broadcast_ss(&p[t][j]), value, sum[t]);
            }
            for (int t = 0; t < QUERIES; t++) _mm256_storeu_ps(sums + t * ld + d, sum[t]);
        }
    }
    for (int64_t t = 0; t < queries; t++)
        for (int64_t d = 0; d < dim; d++) a->y[((i0 + t) * a->n_head + h) * dim + d] = sums[t * ld + d] / total[t];
}

static void avx2_attention(const ops *o, float *y, const float *q, const attention_keys *keys, int64_t n, int64_t n_head, int64_t dim) {
    attending a = {o, y, q, keys, n, n_head, dim};
    pool_run(o->pool, attention_item, &a, (n + QUERIES - 1) / QUERIES * n_head);
}

/* ---- Vocabulary ---- */

/* Per chunk of the vocabulary: sums of e^d and d e^d, d = z - peak, in lanes and then in double. */
static void chunk_sums(const float *z, int64_t n, float peak, double *total, double *weighted) {
    __m256 sum = _mm256_setzero_ps(), moment = _mm256_setzero_ps();
    for (int64_t v = 0; v < n; v += 8) {
        const __m256i mask = first_lanes(n - v);
        const __m256 d = _mm256_sub_ps(_mm256_maskload_ps(z + v, mask), _mm256_set1_ps(peak));
        const __m256 e = _mm256_and_ps(exp8(d), _mm256_castsi256_ps(mask));
        sum = _mm256_add_ps(sum, e);
        moment = _mm256_fmadd_ps(e, d, moment);
    }
    *total = (double)sum8(sum);
    *weighted = (double)sum8(moment);
}

typedef struct choosing {
    dg_choice *out;
    const float *z;
    int64_t n_vocab;
    const double *u;
} choosing;

static void choose_item(void *arg, int64_t i, int32_t thread) {
    const choosing *a = arg;
    const float *z = a->z + i * a->n_vocab;
    (void)thread;
    __m256 most = _mm256_set1_ps(-INFINITY);
    int64_t v = 0;
    for (; v + 8 <= a->n_vocab; v += 8) most = _mm256_max_ps(_mm256_loadu_ps(z + v), most);
    float lanes[8], peak = -INFINITY;
    _mm256_storeu_ps(lanes, most);
    for (int k = 0; k < 8; k++) peak = lanes[k] > peak ? lanes[k] : peak;
    for (; v < a->n_vocab; v++) peak = z[v] > peak ? z[v] : peak;
    int64_t best = 0;
    while (best < a->n_vocab - 1 && z[best] != peak) best++;

    double total = 0.0, weighted = 0.0;
    for (int64_t c = 0; c < a->n_vocab; c += CHUNK) {
        double t, w;
        chunk_sums(z + c, least(CHUNK, a->n_vocab - c), peak, &t, &w);
        total += t;
        weighted += w;
    }
    /* the draw: the chunk in which the sum passes u Z, then the token */
    const double aim = a->u[i] * total;
    double below = 0.0;
    int64_t sample = -1;
    for (int64_t c = 0; c < a->n_vocab && sample < 0; c += CHUNK) {
        const int64_t n = least(CHUNK, a->n_vocab - c);
        double t, w;
        chunk_sums(z + c, n, peak, &t, &w);
        if (below + t > aim) {
            for (int64_t k = 0; k < n && sample < 0; k += 8) {
                const __m256i mask = first_lanes(n - k);
                _mm256_storeu_ps(lanes, _mm256_and_ps(exp8(_mm256_sub_ps(_mm256_maskload_ps(z + c + k, mask), _mm256_set1_ps(peak))), _mm256_castsi256_ps(mask)));
                for (int64_t l = 0; l < least(8, n - k) && sample < 0; l++) {
                    below += (double)lanes[l];
                    if (below > aim) sample = c + k + l;
                }
            }
        } else {
            below += t;
        }
    }
    const double entropy = log(total) - weighted / total;
    a->out[i] = (dg_choice){entropy > 0.0 ? (float)entropy : 0.0f, (int32_t)best, (int32_t)(sample < 0 ? best : sample)};
}

static void avx2_choose(const ops *o, dg_choice *out, const float *z, int64_t n, int64_t n_vocab, const double *u) {
    pool_run(o->pool, choose_item, &(choosing){out, z, n_vocab, u}, n);
}

typedef struct conditioning {
    const ops *o;
    float *y, *p;
    const float *z;
    const tensor *table;
    int64_t n, block_columns;
    float scale;
} conditioning;

/* p = softmax(z) * scale, a row */
static void share_item(void *arg, int64_t i, int32_t thread) {
    const conditioning *a = arg;
    const int64_t n_vocab = a->table->rows;
    const float *z = a->z + i * n_vocab;
    float *p = a->p + i * n_vocab, peak = -INFINITY;
    (void)thread;
    for (int64_t v = 0; v < n_vocab; v++) peak = z[v] > peak ? z[v] : peak;
    double total = 0.0;
    for (int64_t c = 0; c < n_vocab; c += CHUNK) {
        double t, w;
        chunk_sums(z + c, least(CHUNK, n_vocab - c), peak, &t, &w);
        total += t;
    }
    const __m256 share = _mm256_set1_ps((float)((double)a->scale / total));
    for (int64_t v = 0; v < n_vocab; v += 8) {
        const __m256i mask = first_lanes(n_vocab - v);
        const __m256 e = exp8(_mm256_sub_ps(_mm256_maskload_ps(z + v, mask), _mm256_set1_ps(peak)));
        _mm256_maskstore_ps(p + v, mask, _mm256_mul_ps(e, share));
    }
}

/* A stretch of columns of y = p table: blocks of the vocabulary are decoded once for all rows. */
static void blend_item(void *arg, int64_t item, int32_t thread) {
    const conditioning *a = arg;
    const tensor *t = a->table;
    const dg_format *f = t->format;
    const int64_t c0 = item * a->block_columns, columns = least(a->block_columns, t->cols - c0), ld = (columns + 7) / 8 * 8;
    float *words = scratch_of(a->o, thread);
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < columns; j++) a->y[i * t->cols + c0 + j] = 0.0f;
    for (int64_t v0 = 0; v0 < t->rows; v0 += WORDS) {
        const int64_t n = least(WORDS, t->rows - v0);
        for (int64_t v = 0; v < n; v++) f->decode(tensor_row(t, 0, v0 + v) + c0 / f->block * f->bytes, words + v * ld, columns / f->block);
        for (int64_t i = 0; i < a->n; i++) {
            const float *p = a->p + i * t->rows + v0;
            float *y = a->y + i * t->cols + c0;
            for (int64_t j = 0; j < columns; j += 32) {
                __m256 sum[4];
                __m256i mask[4];
                for (int k = 0; k < 4; k++) {
                    mask[k] = first_lanes(columns - j - 8 * k < 0 ? 0 : columns - j - 8 * k);
                    sum[k] = _mm256_maskload_ps(y + j + 8 * k, mask[k]);
                }
                for (int64_t v = 0; v < n; v++) {
                    const __m256 share = _mm256_broadcast_ss(p + v);
                    for (int k = 0; k < 4; k++) sum[k] = _mm256_fmadd_ps(share, _mm256_maskload_ps(words + v * ld + j + 8 * k, mask[k]), sum[k]);
                }
                for (int k = 0; k < 4; k++) _mm256_maskstore_ps(y + j + 8 * k, mask[k], sum[k]);
            }
        }
    }
}

static void avx2_condition(const ops *o, float *y, const float *z, const tensor *table, int64_t n, float scale, float *work) {
    conditioning a = {o, y, work, z, table, n, COLUMNS, scale};
    pool_run(o->pool, share_item, &a, n);
    pool_run(o->pool, blend_item, &a, (table->cols + COLUMNS - 1) / COLUMNS);
}

const char *cpu_avx2_install(ops *o) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return NULL;
    o->matmul = avx2_matmul;
    o->gelu_mul = avx2_gelu_mul;
    o->softcap = avx2_softcap;
    o->experts = avx2_experts;
    o->attention = avx2_attention;
    o->choose = avx2_choose;
    o->condition = avx2_condition;
    return "avx2";
}

#endif
