/* The output head and self-conditioning with quantised weights, without storing logits.
 *
 * The vocabulary is cut into groups, and a group into chunks. A thread computes the logits of one group, chunk by
 * chunk. For each row and chunk it stores the largest logit (the peak) and two sums, and for each row and group the
 * likely ids. From these, entropy, argmax and the sampled id of a row are computed, and for self-conditioning the
 * probabilities of the likely ids; the probability of all other ids together is known exactly.
 *
 * No result depends on which thread computes which group, so results are the same for any number of threads.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "gemm.h"
#include "self_condition.h"

/* An id is likely if its logit is at most REACH nats below the row's peak. This is enough for the error bound in
 * condition_item() where a row has about a dozen probable tokens (for normally distributed logits: 600 ids are kept
 * where e^entropy is 8). A chunk whose peak is NEGLIGIBLE nats below the row's adds less than 1e-12 to the row's sums,
 * and is skipped. */
#define REACH 15.0f
#define NEGLIGIBLE 40.0f

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The arguments of gemm_head(). */
typedef struct head_args {
    const ops *o;
    const gemm_kernel *k;
    const tensor *table;
    const gemm_input *x; /* [n] the rows of all parts */
    const head_part *parts;
    int64_t n; /* rows of all parts */
    float cap; /* softcap */
} head_args;

/* Row i of a part. */
typedef struct head_row {
    const head_part *part;
    self_cond *s;
    int64_t i;
    float slope; /* 1 / temperature */
} head_row;

static head_row row_at(const head_args *a, int64_t row) {
    const head_part *p = a->parts;
    while (row >= p->n) {
        row -= p->n;
        p++;
    }
    return (head_row){.part = p, .s = p->next, .i = row, .slope = 1.0f / *p->temperature};
}

/* A logit after softcap, divided by the temperature. */
static float squashed(const head_args *a, float logit, float slope) { return a->cap * tanhf(logit / a->cap) * slope; }

/* Whether likely id i is dropped before j: the one with the smaller logit; of equal ones, the larger id. */
static bool lesser(const self_cond_list *l, int32_t i, int32_t j) {
    return l->z[i] < l->z[j] || (l->z[i] == l->z[j] && l->ids[i] > l->ids[j]);
}

/* Moves item `at` of a binary heap, whose smallest item is first, down to where it belongs. */
static void sift_down(self_cond_list *l, int32_t at) {
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= SELF_COND_GROUP_IDS) return;
        if (child + 1 < SELF_COND_GROUP_IDS && lesser(l, child + 1, child)) child++;
        if (!lesser(l, child, at)) return;
        const int32_t id = l->ids[at];
        const float z = l->z[at];
        l->ids[at] = l->ids[child];
        l->z[at] = l->z[child];
        l->ids[child] = id;
        l->z[child] = z;
        at = child;
    }
}

/* Adds an id to a list, which keeps the SELF_COND_GROUP_IDS largest logits; of equal ones, those that were added
 * first. Once a list is full, it is a heap. */
static void keep(self_cond_list *l, int32_t id, float z) {
    if (l->count < SELF_COND_GROUP_IDS) {
        l->ids[l->count] = id;
        l->z[l->count++] = z;
        if (l->count < SELF_COND_GROUP_IDS) return;
        for (int32_t i = SELF_COND_GROUP_IDS / 2 - 1; i >= 0; i--) sift_down(l, i);
    } else if (z > l->z[0]) {
        l->ids[0] = id;
        l->z[0] = z;
        sift_down(l, 0);
    }
}

/* Computes the peak, the sums and the likely ids of a row in a chunk; z[count] are the raw logits, which are changed.
 * group_peak: the largest scaled logit of the row in this group so far. */
static void pass_row(const head_args *a, head_row r, int64_t chunk, float *z, int64_t count, float *group_peak) {
    self_cond *s = r.s;
    self_cond_part *sums = &s->parts[chunk * s->n + r.i];
    sums->peak = squashed(a, a->o->gemm->peak(z, count), r.slope); /* softcap is monotone, and NaN stays NaN */
    sums->total = sums->moment = 0.0f;
    const float floor = s->floors[r.i] > *group_peak ? s->floors[r.i] : *group_peak;
    if (!(sums->peak >= floor - NEGLIGIBLE)) return; /* also where the peak is NaN */
    a->o->gemm->squash(z, count, a->cap, r.slope);
    sums->peak = a->o->gemm->peak(z, count);
    a->o->gemm->sums(z, count, sums->peak, &sums->total, &sums->moment);
    if (sums->peak > *group_peak) *group_peak = sums->peak;
    const float least_likely = (floor > sums->peak ? floor : sums->peak) - REACH;
    if (sums->peak < least_likely) return;
    self_cond_list *list = &s->lists[chunk * SELF_COND_CHUNK / SELF_COND_GROUP * s->n + r.i];
    for (int64_t v = 0; v < count; v++)
        if (z[v] >= least_likely) keep(list, (int32_t)(chunk * SELF_COND_CHUNK + v), z[v]);
}

/* Computes the raw logits of a chunk for the rows tokens[n] of x: z[n][SELF_COND_CHUNK]. */
static void chunk_logits(const head_args *a, const gemm_scratch *r, int64_t chunk, const int32_t *tokens, int64_t n,
                         float *z) {
    const int64_t begin = chunk * SELF_COND_CHUNK, end = least(begin + SELF_COND_CHUNK, a->table->rows);
    for (int64_t row = begin; row < end; row += GEMM_ROWS) {
        const gemm_strip strip = {.w = a->table, .row = row}, next = {.w = a->table, .row = row + GEMM_ROWS};
        gemm_product(a->k, r->panel, &strip, next.row < a->table->rows ? &next : NULL, a->x, tokens, n, r->acc);
        for (int64_t i = 0; i < n; i++)
            memcpy(z + i * SELF_COND_CHUNK + row - begin, r->acc + i * GEMM_ROWS, GEMM_ROWS * sizeof *z);
    }
}

/* Computes one group of the vocabulary for all rows. */
static void group_item(void *arg, int64_t group, int32_t thread) {
    const head_args *a = arg;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int64_t end = least((group + 1) * SELF_COND_GROUP, a->table->rows);
    for (int64_t from = 0; from < a->n; from += GEMM_HEAD_ROWS) {
        const int64_t n = least(GEMM_HEAD_ROWS, a->n - from);
        head_row rows[GEMM_HEAD_ROWS];
        int32_t tokens[GEMM_HEAD_ROWS];
        float peaks[GEMM_HEAD_ROWS];
        for (int64_t i = 0; i < n; i++) {
            rows[i] = row_at(a, from + i);
            rows[i].s->lists[group * rows[i].s->n + rows[i].i].count = 0;
            tokens[i] = (int32_t)(from + i);
            peaks[i] = -INFINITY;
        }
        for (int64_t row = group * SELF_COND_GROUP; row < end; row += SELF_COND_CHUNK) {
            const int64_t chunk = row / SELF_COND_CHUNK, count = least(SELF_COND_CHUNK, end - row);
            chunk_logits(a, &r, chunk, tokens, n, r.tile);
            for (int64_t i = 0; i < n; i++) pass_row(a, rows[i], chunk, r.tile + i * SELF_COND_CHUNK, count, &peaks[i]);
        }
    }
}

/* Computes a lower bound of a row's peak: the scaled logit of the id that was best at the last step, if there was one.
 */
static void floor_item(void *arg, int64_t row, int32_t thread) {
    const head_args *a = arg;
    const head_row at = row_at(a, row);
    at.s->floors[at.i] = -INFINITY;
    if (!at.s->started || at.s->argmax[at.i] < 0) return;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int32_t id = at.s->argmax[at.i], token = (int32_t)row;
    const gemm_strip strip = {.w = a->table, .row = id / GEMM_ROWS * GEMM_ROWS};
    gemm_product(a->k, r.panel, &strip, NULL, a->x, &token, 1, r.acc);
    at.s->floors[at.i] = squashed(a, r.acc[id % GEMM_ROWS], at.slope);
}

/* Merges the results of all chunks of a row: entropy, argmax, the chunk of the sampled id, and the probabilities of the
 * likely ids. */
static void merge_item(void *arg, int64_t row, int32_t thread) {
    const head_row at = row_at(arg, row);
    self_cond *s = at.s;
    const int64_t i = at.i;
    const int64_t chunks = (s->n_vocab + SELF_COND_CHUNK - 1) / SELF_COND_CHUNK,
                  groups = (s->n_vocab + SELF_COND_GROUP - 1) / SELF_COND_GROUP;
    (void)thread;
    float peak = -INFINITY;
    bool finite = true;
    for (int64_t c = 0; c < chunks; c++) {
        peak = fmaxf(peak, s->parts[c * s->n + i].peak);
        finite = finite && isfinite(s->parts[c * s->n + i].peak);
    }
    if (!finite) {
        s->chunks[i] = s->argmax[i] = -1;
        s->counts[i] = 0;
        s->dropped[i] = 0.0;
        at.part->out[i] = (dg_choice){.entropy = NAN, .argmax = -1, .sample = -1};
        return;
    }
    double total = 0.0, moment = 0.0;
    for (int64_t c = 0; c < chunks; c++) {
        const self_cond_part *p = &s->parts[c * s->n + i];
        const double below = (double)p->peak - (double)peak, scale = p->total > 0.0f ? exp(below) : 0.0;
        total += (double)p->total * scale;
        moment += ((double)p->moment + (double)p->total * below) * scale;
    }
    const double target = at.part->u[i] * total; /* the sampled id is the first whose cumulative sum passes this */
    double sum = 0.0;
    s->chunks[i] = -1;
    for (int64_t c = 0; c < chunks && s->chunks[i] < 0; c++) {
        const self_cond_part *p = &s->parts[c * s->n + i];
        if (p->total == 0.0f) continue;
        const double scale = exp((double)p->peak - (double)peak), share = (double)p->total * scale;
        if (sum + share > target) {
            s->chunks[i] = (int32_t)c;
            s->aims[i] = (target - sum) / scale;
        }
        sum += share;
    }

    int32_t best = -1;
    double kept = 0.0;
    s->counts[i] = 0;
    for (int64_t g = 0; g < groups; g++) {
        const self_cond_list *l = &s->lists[g * s->n + i];
        for (int32_t j = 0; j < l->count; j++) {
            if (l->z[j] == peak && (best < 0 || l->ids[j] < best)) best = l->ids[j];
            if (l->z[j] < peak - REACH || s->counts[i] == SELF_COND_IDS) continue;
            const double share = exp((double)l->z[j] - (double)peak) / total;
            s->ids[i * SELF_COND_IDS + s->counts[i]] = l->ids[j];
            s->shares[i * SELF_COND_IDS + s->counts[i]++] = (float)share;
            kept += share;
        }
    }
    s->dropped[i] = kept < 1.0 ? 1.0 - kept : 0.0;
    s->argmax[i] = best;
    const double entropy = log(total) - moment / total;
    at.part->out[i] = (dg_choice){.entropy = entropy > 0.0 ? (float)entropy : 0.0f, .argmax = best, .sample = best};
}

/* Finds the sampled id of a row in its chunk: the first one at which the cumulative sum passes s->aims. */
static void draw_item(void *arg, int64_t row, int32_t thread) {
    const head_args *a = arg;
    const head_row at = row_at(a, row);
    const self_cond *s = at.s;
    const int64_t chunk = s->chunks[at.i], count = least(SELF_COND_CHUNK, s->n_vocab - chunk * SELF_COND_CHUNK);
    if (chunk < 0) return;
    const gemm_scratch r = gemm_scratch_for(a->o, thread);
    const int32_t token = (int32_t)row;
    chunk_logits(a, &r, chunk, &token, 1, r.tile);
    a->o->gemm->squash(r.tile, count, a->cap, at.slope);
    const double peak = (double)s->parts[chunk * s->n + at.i].peak;
    double sum = 0.0;
    for (int64_t v = 0; v < count; v++) {
        const double p = exp((double)r.tile[v] - peak);
        sum += p;
        if (p > 0.0) at.part->out[at.i].sample = (int32_t)(chunk * SELF_COND_CHUNK + v);
        if (sum > s->aims[at.i]) return;
    }
}

void gemm_head(const ops *o, const head_part *parts, int32_t n_parts, const float *x, const tensor *table, int64_t n,
               float cap, void *work) {
    const gemm_kernel *k = gemm_kernel_for(o->gemm, table);
    if (!k) {
        o->float_head(o, parts, n_parts, x, table, n, cap, work);
        return;
    }
    char *at = work;
    const gemm_input rounded = gemm_quantise(o, k, x, n, table->cols, &at);
    head_args a = {.o = o, .k = k, .table = table, .x = &rounded, .parts = parts, .n = n, .cap = cap};
    for (const head_part *p = parts; p < parts + n_parts; p++) {
        p->next->cap = cap;
        p->next->temperature = p->temperature;
        memcpy(p->next->x, x, (size_t)(p->n * table->cols) * sizeof *x);
        x += p->n * table->cols;
    }
    pool_run(o->pool, floor_item, &a, n);
    pool_run(o->pool, group_item, &a, (table->rows + SELF_COND_GROUP - 1) / SELF_COND_GROUP);
    pool_run(o->pool, merge_item, &a, n);
    pool_run(o->pool, draw_item, &a, n);
    for (const head_part *p = parts; p < parts + n_parts; p++) p->next->started = true;
}

/* ---- Self-conditioning ---- */

/* The arguments of gemm_self_condition(). */
typedef struct condition_args {
    const ops *o;
    float *y; /* [n][table->cols] the result */
    const self_cond *s;
    const tensor *table; /* the embedding */
    float scale;
    double longest; /* the largest norm of a row of the table */
    double *norms;  /* [items] for every NORM_ROWS rows of the table the largest squared norm */
    bool *dense;    /* [n] rows whose error bound exceeds the tolerance */
} condition_args;

enum { NORM_ROWS = 4096 };

/* Decodes a row of the table into the thread's scratch memory. */
static float *row_of(const condition_args *a, int32_t thread, int64_t id) {
    float *row = a->o->scratch + thread * a->o->scratch_floats;
    a->o->gemm->decode(a->table, id, row);
    return row;
}

static void norm_item(void *arg, int64_t item, int32_t thread) {
    const condition_args *a = arg;
    a->norms[item] = 0.0;
    for (int64_t id = item * NORM_ROWS; id < least((item + 1) * NORM_ROWS, a->table->rows); id++) {
        const float *row = row_of(a, thread, id);
        float lanes[8] = {0.0f};
        int64_t j = 0;
        for (; j + 8 <= a->table->cols; j += 8)
            for (int l = 0; l < 8; l++) lanes[l] += row[j + l] * row[j + l];
        double sum = 0.0;
        for (; j < a->table->cols; j++) sum += (double)row[j] * (double)row[j];
        for (int l = 0; l < 8; l++) sum += (double)lanes[l];
        if (sum > a->norms[item]) a->norms[item] = sum;
    }
}

/* The largest norm of a row of the table. It is computed once per model, in at most the time of one self-conditioning.
 */
static double longest_row(condition_args *a, void *work) {
    _Atomic double *known = &((ops *)(uintptr_t)a->o)->longest; /* const is cast away: it is computed on first use */
    double longest = atomic_load(known);
    if (longest > 0.0) return longest;
    const int64_t items = (a->table->rows + NORM_ROWS - 1) / NORM_ROWS;
    a->norms = work;
    pool_run(a->o->pool, norm_item, a, items);
    for (int64_t i = 0; i < items; i++) longest = fmax(longest, a->norms[i]);
    longest = sqrt(longest) * (1.0 + 1e-5); /* rounded up by more than its rounding error: it must be a bound */
    atomic_store(known, longest);
    return longest;
}

/* Prefetches a row of the table: rows of likely ids lie anywhere in it, and the next one is loaded while this one is
 * added. */
static void prefetch_row(const tensor *table, int64_t row) {
    const uint8_t *at = tensor_row(table, 0, row);
    for (int64_t i = 0; i < table->row_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* Computes a row as the sum of the embeddings of its likely ids, and whether its error may exceed the tolerance. */
static void condition_item(void *arg, int64_t i, int32_t thread) {
    const condition_args *a = arg;
    const int64_t d = a->table->cols;
    float *y = a->y + i * d;
    memset(y, 0, (size_t)d * sizeof *y);
    a->dense[i] = false;
    if (a->s->pinned && a->s->pinned[i]) {
        const float *row = a->s->given ? row_of(a, thread, a->s->given[i]) : NULL;
        for (int64_t c = 0; row && c < d; c++) y[c] = a->scale * row[c];
        return;
    }
    const int32_t *ids = a->s->ids + i * SELF_COND_IDS, count = a->s->counts[i];
    for (int32_t j = 0; j < count; j++) {
        if (j + 1 < count) prefetch_row(a->table, ids[j + 1]);
        a->o->gemm->blend(a->table, ids[j], a->s->shares[i * SELF_COND_IDS + j] * a->scale, y);
    }
    double square = 0.0;
    for (int64_t c = 0; c < d; c++) square += (double)y[c] * (double)y[c];
    /* The tolerance is relative to the norm of the sum. Ids that were left out add at most `dropped` times the longest
     * row. A row with a larger bound is computed with the whole vocabulary. */
    a->dense[i] = a->o->tolerance < 0.0f ||
                  a->s->dropped[i] * a->longest * (double)a->scale > (double)a->o->tolerance * sqrt(square);
}

void gemm_self_condition(const ops *o, float *y, const self_cond *s, const tensor *table, int64_t n, float scale,
                         void *work, float *scratch) {
    if (!gemm_kernel_for(o->gemm, table)) {
        o->float_self_condition(o, y, s, table, n, scale, work, scratch);
        return;
    }
    condition_args a = {.o = o, .y = y, .s = s, .table = table, .scale = scale};
    a.longest = longest_row(&a, work);
    a.dense = work;
    pool_run(o->pool, condition_item, &a, n);

    /* Computes the dense rows with the whole vocabulary; they are first gathered in scratch memory. */
    char *at = (char *)work + (n + 63) / 64 * 64;
    int64_t *rows = (int64_t *)(void *)at, n_dense = 0;
    at += (n * (int64_t)sizeof *rows + 63) / 64 * 64;
    float *x = (float *)(void *)at, *soft_rows = x + n * table->cols;
    at = (char *)(soft_rows + n * table->cols);
    for (int64_t i = 0; i < n; i++)
        if (a.dense[i]) {
            rows[n_dense] = i;
            memcpy(x + n_dense++ * table->cols, s->x + i * table->cols, (size_t)table->cols * sizeof *x);
        }
    if (n_dense == 0) return;
    o->matmul(o, s->z, x, table, n_dense, at);
    o->softcap(o, s->z, n_dense * table->rows, s->cap);
    o->divide(o, s->z, s->z, n_dense * table->rows, *s->temperature);
    o->self_condition_dense(o, soft_rows, s->z, table, n_dense, scale, scratch);
    for (int64_t i = 0; i < n_dense; i++)
        memcpy(y + rows[i] * table->cols, soft_rows + i * table->cols, (size_t)table->cols * sizeof *y);
}
