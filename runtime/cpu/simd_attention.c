/* Attention block by block of keys: scores, softmax as it goes, and the weighted values, each a product of packed
 * panels.
 *
 * The rows of a product are (query, head) pairs of one KV head, so that a packed block of keys and values serves all
 * heads that read it. Blocks lie at fixed positions and hidden scores weigh exactly 0, so that a row's result does
 * not depend on which others it is computed with. */
#include <math.h>
#include <string.h>

#include "simd_math.h"
#include "simd_ops.h"
#include "simd_tile.h"

enum {
    ROWS = ATTENTION_ROWS,
    KEYS = ATTENTION_KEYS,
    DEPTH = 128, /* dimensions of the keys that stay in L1 while the rows pass */
};

typedef struct attending {
    const ops *o;
    float *y;
    const float *q;
    const attention_keys *keys;
    int64_t n, n_head, dim;
    int64_t block; /* rows per item, whole tiles */
} attending;

/* The rows of an item and what is known of each so far. */
typedef struct crowd {
    int64_t n;
    const float *q[ROWS];
    float *y[ROWS];                     /* sums of p v, at last divided by total */
    float *p[ROWS];                     /* [KEYS] scores of the block, then e^(score - peak) */
    float *packed_q, *packed_p;         /* tile behind tile */
    int64_t from[ROWS], to[ROWS];       /* the keys it sees */
    float peak[ROWS], total[ROWS];
    float keep[ROWS];                   /* what the block's new peak leaves of the sums */
} crowd;

/* A tile of rows, and the panels of the block's keys of which one of them sees any: the others are passed over. */
typedef struct slice {
    int64_t row, rows;
    int64_t from, to; /* keys of the block, whole panels */
} slice;

static int64_t slices_of(const crowd *c, int64_t block, slice *s) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->n; i += TILE) {
        slice a = {.row = i, .rows = least(TILE, c->n - i), .from = KEYS, .to = 0};
        for (int64_t r = i; r < i + a.rows; r++) {
            a.from = least(a.from, most(c->from[r] - block, 0));
            a.to = most(a.to, least(c->to[r] - block, KEYS));
        }
        a.from = a.from / COLUMNS * COLUMNS;
        a.to = (a.to + COLUMNS - 1) / COLUMNS * COLUMNS;
        if (a.from < a.to) s[n++] = a;
    }
    return n;
}

/* Rows that will be packed next, fetched into the cache a few lines at a time while tiles are computed: at a stride of
 * many KB the hardware does not see them coming. */
typedef struct coming {
    const char *rows;
    int64_t stride, bytes, count; /* bytes from row to row, of a row, and rows */
    int64_t row, at;              /* how far it is */
    int64_t share;                /* lines for each tile */
} coming;

static coming fetch_during(const float *rows, int64_t stride, int64_t count, int64_t dim, int64_t tiles) {
    const int64_t line = 64, bytes = dim * (int64_t)sizeof(float);
    return (coming){.rows = (const char *)rows,
                    .stride = stride * (int64_t)sizeof(float),
                    .bytes = bytes,
                    .count = count,
                    .row = 0,
                    .at = 0,
                    .share = (count * (bytes + line) / line + tiles - 1) / most(tiles, 1)};
}

static inline void fetch(coming *f) {
    for (int64_t i = 0; i < f->share && f->row < f->count; i++) {
        __builtin_prefetch(f->rows + f->row * f->stride + f->at, 0, 2);
        f->at += 64;
        if (f->at < f->bytes) continue;
        f->at = 0;
        f->row++;
    }
}

/* Scores of every slice against `count` keys, whose first is at k. */
static void score(crowd *c, const slice *s, int64_t n, const float *k, int64_t stride, int64_t count, int64_t dim,
                  float *packed, coming *next) {
    for (int64_t at = 0; at < count; at += COLUMNS) {
        const float *rows[COLUMNS];
        for (int64_t j = 0; j < COLUMNS; j++) rows[j] = k + (at + j) * stride;
        pack_rows(packed, COLUMNS, rows, count - at, dim);
        for (int64_t d = 0; d < dim; d += DEPTH) {
            const panel p = {
                .packed = packed + d * COLUMNS, .depth = least(DEPTH, dim - d), .at = at, .count = COLUMNS};
            for (int64_t i = 0; i < n; i++) {
                fetch(next);
                if (at >= s[i].from && at < s[i].to)
                    tile(s[i].rows, &p, c->p + s[i].row, c->packed_q + s[i].row * dim + d * s[i].rows,
                         d ? WHOLE : NULL);
            }
        }
    }
}

/* Turns a row's scores of keys [from, to) of the block into weights. */
static void weigh(crowd *c, int64_t r, int64_t block, int64_t from, int64_t to) {
    float *p = c->p[r];
    for (int64_t j = from; j < to && block + j < c->from[r]; j++) p[j] = -INFINITY;
    for (int64_t j = most(from, c->to[r] - block); j < to; j++) p[j] = -INFINITY;
    vf best = vf_load(p + from);
    for (int64_t j = from + LANES; j < to; j += LANES) best = vf_max(best, vf_load(p + j));
    const float largest = vf_largest(best), next = largest > c->peak[r] ? largest : c->peak[r];
    c->keep[r] = 1.0f;
    if (next == -INFINITY) { /* nothing seen yet */
        memset(p + from, 0, (size_t)(to - from) * sizeof *p);
        return;
    }
    if (next > c->peak[r]) c->keep[r] = expf(c->peak[r] - next);
    vf sum = vf_set(0.0f);
    for (int64_t j = from; j < to; j += LANES) {
        const vf e = vf_exp(vf_sub(vf_load(p + j), vf_set(next)));
        vf_store(p + j, e);
        sum = vf_add(sum, e);
    }
    c->peak[r] = next;
    c->total[r] = c->total[r] * c->keep[r] + vf_sum(sum);
}

/* Adds the values, of which there are `count` from v on, by their weights. */
static void blend(crowd *c, const slice *s, int64_t n, const float *v, int64_t stride, int64_t count, int64_t dim,
                  float *packed, coming *next) {
    for (int64_t i = 0; i < n; i++)
        pack_rows(c->packed_p + s[i].row * KEYS, s[i].rows, (const float *const *)(c->p + s[i].row), s[i].rows,
                  s[i].to);
    for (int64_t j = 0; j < count; j++) /* row by row, as they lie in memory */
        for (int64_t d = 0; d < dim; d += COLUMNS)
            pack_columns(packed + d * KEYS + j * COLUMNS, v + j * stride + d, stride, dim - d, 1);
    for (int64_t d = 0; d < dim; d += COLUMNS) {
        memset(packed + d * KEYS + count * COLUMNS, 0, (size_t)((KEYS - count) * COLUMNS) * sizeof *packed);
        for (int64_t i = 0; i < n; i++) {
            fetch(next);
            const panel p = {.packed = packed + d * KEYS + s[i].from * COLUMNS,
                             .depth = s[i].to - s[i].from,
                             .at = d,
                             .count = least(COLUMNS, dim - d)};
            tile(s[i].rows, &p, c->y + s[i].row, c->packed_p + s[i].row * KEYS + s[i].from * s[i].rows,
                 c->keep + s[i].row);
        }
    }
}

static void attention_item(void *arg, int64_t item, int32_t thread) {
    const attending *a = arg;
    const attention_keys *s = a->keys;
    const float *s_k = s->k, *s_v = s->v;
    const int64_t kv = item % s->n_kv, dim = a->dim, stride = s->n_kv * dim;
    const int64_t first_head = (kv * a->n_head + s->n_kv - 1) / s->n_kv,
                  heads = ((kv + 1) * a->n_head + s->n_kv - 1) / s->n_kv - first_head;
    float *scores = scratch_of(a->o, thread);
    slice slices[ROWS];
    crowd c;
    c.packed_p = scores + a->block * KEYS;
    c.packed_q = c.packed_p + a->block * KEYS;
    float *packed = c.packed_q + a->block * dim;
    c.n = 0;
    int64_t lowest = INT64_MAX, highest = 0;
    for (int64_t row = item / s->n_kv * a->block; row < least((item / s->n_kv + 1) * a->block, a->n * heads); row++) {
        const int64_t i = row / heads, at = (i * a->n_head + first_head + row % heads) * dim, r = c.n++;
        c.q[r] = a->q + at;
        c.y[r] = a->y + at;
        c.p[r] = scores + r * KEYS;
        attention_span(s, i, &c.from[r], &c.to[r]);
        c.peak[r] = -INFINITY;
        c.total[r] = 0.0f;
        memset(c.y[r], 0, (size_t)dim * sizeof(float));
        lowest = least(lowest, c.from[r]);
        highest = most(highest, c.to[r]);
    }
    for (int64_t r = 0; r < c.n; r += TILE)
        pack_rows(c.packed_q + r * dim, least(TILE, c.n - r), c.q + r, least(TILE, c.n - r), dim);
    for (int64_t block = lowest / KEYS * KEYS; block < highest; block += KEYS) {
        const int64_t count = least(KEYS, s->count - block), at = (block * s->n_kv + kv) * dim,
                      n = slices_of(&c, block, slices);
        const int64_t later = block + KEYS < highest ? least(KEYS, s->count - block - KEYS) : 0;
        coming values = fetch_during(s_v + at, stride, count, dim,
                                     n * ((count + COLUMNS - 1) / COLUMNS) * ((dim + DEPTH - 1) / DEPTH));
        coming keys = fetch_during(s_k + at + KEYS * stride, stride, later, dim, n * ((dim + COLUMNS - 1) / COLUMNS));
        score(&c, slices, n, s_k + at, stride, count, dim, packed, &values);
        for (int64_t i = 0; i < n; i++)
            for (int64_t r = slices[i].row; r < slices[i].row + slices[i].rows; r++)
                weigh(&c, r, block, slices[i].from, slices[i].to);
        blend(&c, slices, n, s_v + at, stride, count, dim, packed, &keys);
    }
    for (int64_t r = 0; r < c.n; r++) {
        const vf total = vf_set(c.total[r]);
        for (int64_t d = 0; d < dim; d += LANES)
            vf_store_first(c.y[r] + d, vf_div(vf_load_first(c.y[r] + d, dim - d), total), dim - d);
    }
}

void SIMD(attention)(const ops *o, float *y, const float *q, const attention_keys *keys, int64_t n, int64_t n_head,
                     int64_t dim) {
    /* items per thread, as long as packing the keys is little work beside using them */
    enum { SHARE = 4, LEAST = 4 * TILE };
    const int64_t rows = n * ((n_head + keys->n_kv - 1) / keys->n_kv),
                  items = most(1, SHARE * pool_threads(o->pool) / keys->n_kv);
    const int64_t block = least(attention_rows(dim), most(LEAST, (rows + items - 1) / items)),
                  blocks = (rows + block - 1) / block;
    attending a = {.o = o,
                   .y = y,
                   .q = q,
                   .keys = keys,
                   .n = n,
                   .n_head = n_head,
                   .dim = dim,
                   .block = ((rows + blocks - 1) / blocks + TILE - 1) / TILE * TILE};
    pool_run(o->pool, attention_item, &a, blocks * keys->n_kv);
}
