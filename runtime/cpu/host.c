/* Operations that all CPU backends share: memory, routing, the grouping of tokens by expert, and canvases. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "canvas_position.h"
#include "carve.h"
#include "cpu.h"

/* ---- Memory: ops work in the caller's ---- */

void host_reserve(const ops *o, void **out, size_t bytes) {
    (void)o;
    *out = os_reserve(bytes);
}

void host_release(const ops *o, void *memory, size_t bytes) {
    (void)o;
    os_release(memory, bytes);
}

void host_available(const ops *o, int64_t *bytes) {
    (void)o;
    *bytes = -1;
}

void host_upload(const ops *o, void *to, const void *from, size_t bytes) {
    (void)o;
    memcpy(to, from, bytes);
}

void host_download(const ops *o, void *to, const void *from, size_t bytes) { host_upload(o, to, from, bytes); }
void host_copy(const ops *o, void *to, const void *from, size_t bytes) { host_upload(o, to, from, bytes); }

void host_place(const ops *o, tensor *w) { (void)o, (void)w; }
void host_place_experts(const ops *o, const expert_plan *p) { (void)o, (void)p; }
void host_begin_pass(const ops *o, int32_t layers, int32_t *nonfinite) {
    (void)o, (void)layers;
    *nonfinite = 0;
}
void host_end_pass(const ops *o) { (void)o; }

void host_store(const ops *o, void *cache, int64_t first, const float *x, int64_t n, int64_t d) {
    host_upload(o, (float *)cache + first * d, x, (size_t)(n * d) * sizeof *x);
}

void host_graph_begin(const ops *o, recording *r, bool *replayed) {
    (void)o, (void)r;
    *replayed = false;
}

void host_graph_end(const ops *o, recording *r) { (void)o, (void)r; }
void host_graph_free(const ops *o, recording *r) { (void)o, (void)r; }

/* ---- Routing ---- */

void host_routing_add(const ops *o, _Atomic int64_t *counts, const int32_t *experts, int64_t n) {
    (void)o;
    for (int64_t i = 0; i < n; i++) atomic_fetch_add_explicit(&counts[experts[i]], 1, memory_order_relaxed);
}

void host_routing_read(const ops *o, int64_t *out, const _Atomic int64_t *counts, int64_t n) {
    (void)o;
    for (int64_t i = 0; i < n; i++) out[i] = atomic_load_explicit(&counts[i], memory_order_relaxed);
}

typedef struct routing {
    int32_t *experts;
    float *weights;
    const float *logits, *scale;
    int64_t n_expert, k;
} routing;

static void route_row(void *arg, int64_t i, int32_t thread) {
    const routing *a = arg;
    const float *logits = a->logits + i * a->n_expert;
    int32_t *experts = a->experts + i * a->k;
    float *weights = a->weights + i * a->k;
    double sum = 0.0;
    (void)thread;
    for (int64_t s = 0; s < a->k; s++) { /* softmax keeps order, and its own sum cancels out */
        int32_t best = -1;
        for (int32_t e = 0; e < a->n_expert; e++) {
            bool taken = false;
            for (int64_t r = 0; r < s; r++) taken |= experts[r] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        experts[s] = best;
        sum += exp((double)logits[best] - (double)logits[experts[0]]);
    }
    for (int64_t s = 0; s < a->k; s++)
        weights[s] = (float)(exp((double)logits[experts[s]] - (double)logits[experts[0]]) / sum) * a->scale[experts[s]];
}

void host_route(const ops *o, int32_t *experts, float *weights, const float *logits, const float *scale, int64_t n,
                int64_t n_expert, int64_t k) {
    pool_run(
        o->pool, route_row,
        &(routing){
            .experts = experts, .weights = weights, .logits = logits, .scale = scale, .n_expert = n_expert, .k = k},
        n);
}

/* ---- Sizes of work ---- */

size_t matmul_work(int64_t n, int64_t cols) {
    const int64_t padded = (cols + 127) / 128 * 128; /* backends pad rows */
    return carve_bytes(n * padded, sizeof(float)) + 8 * CARVE_ALIGNMENT;
}

size_t self_condition_work(int64_t n, int64_t d_model) {
    return 2 * carve_bytes(n * d_model, sizeof(float)) + 2 * carve_bytes(n, 16) + matmul_work(n, d_model) + 4096;
}

size_t experts_work(int64_t n, int64_t k, int64_t d_model, int64_t d_expert, int64_t n_expert) {
    const size_t groups = 2 * carve_bytes(n_expert + 1, sizeof(int32_t)) + carve_bytes(n * k, sizeof(int32_t)) +
                          carve_bytes(n * k + n_expert, 8);
    const size_t values = carve_bytes(n * k * d_expert, sizeof(float)) + carve_bytes(n * k * d_model, sizeof(float));
    const size_t rounding =
        carve_bytes(n * k, sizeof(int32_t)) + matmul_work(n, d_model) + matmul_work(n * k, d_expert);
    const size_t packing = carve_bytes(n * k * d_model, sizeof(float));
    return groups + values + (rounding > packing ? rounding : packing);
}

/* ---- Tokens grouped by expert ---- */

expert_groups group_by_expert(void *work, const int32_t *experts, int64_t n, int64_t k, int64_t d_model,
                              int64_t d_expert, int64_t n_expert) {
    expert_groups g = {.n_expert = (int32_t)n_expert, .rest = work};
    g.list = carve_off(&g.rest, n_expert + 1, sizeof *g.list);
    g.start = carve_off(&g.rest, n_expert + 1, sizeof *g.start);
    g.pairs = carve_off(&g.rest, n * k, sizeof *g.pairs);
    g.hidden = carve_off(&g.rest, n * k * d_expert, sizeof *g.hidden);
    g.out = carve_off(&g.rest, n * k * d_model, sizeof *g.out);
    memset(g.start, 0, (size_t)(n_expert + 1) * sizeof *g.start);
    for (int64_t p = 0; p < n * k; p++) g.start[experts[p] + 1]++;
    for (int64_t e = 0; e < n_expert; e++) g.start[e + 1] += g.start[e];
    for (int64_t p = 0; p < n * k; p++) g.pairs[g.start[experts[p]]++] = (int32_t)p;
    for (int64_t e = n_expert; e > 0; e--) g.start[e] = g.start[e - 1]; /* filling moved each start to its end */
    g.start[0] = 0;
    return g;
}

int32_t next_experts(const expert_feed *feed, expert_groups *g) {
    if (feed) return feed->next(feed->self, g->list);
    if (g->given) return 0;
    g->given = true;
    for (int32_t e = 0; e < g->n_expert; e++) g->list[e] = e;
    return g->n_expert;
}

typedef struct combining {
    float *y;
    const float *out, *weights;
    int64_t k, d;
} combining;

static void combine_row(void *arg, int64_t i, int32_t thread) {
    const combining *a = arg;
    (void)thread;
    float *y = a->y + i * a->d;
    memset(y, 0, (size_t)a->d * sizeof *y);
    for (int64_t s = 0; s < a->k; s++) {
        const float w = a->weights[i * a->k + s], *out = a->out + (i * a->k + s) * a->d;
        for (int64_t j = 0; j < a->d; j++) y[j] += w * out[j];
    }
}

void combine_experts(const ops *o, float *y, const float *out, const float *weights, int64_t n, int64_t k, int64_t d) {
    pool_run(o->pool, combine_row, &(combining){.y = y, .out = out, .weights = weights, .k = k, .d = d}, n);
}

/* ---- Canvases ---- */

void host_canvas_init(const ops *o, canvas_buffers *c, uint64_t seed, int32_t block) {
    (void)o;
    *c->state = (canvas_state){.seed = seed, .block = block};
    for (int32_t i = 0; i < c->n; i++) canvas_init_at(c, c->state, i);
}

void host_canvas_draw(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    (void)o;
    c->state->temperature = sampler_temperature(s, c->state->index);
    for (int32_t i = 0; i < c->n; i++) canvas_draw_at(c, c->state, c->state->index + 1, i);
}

void host_canvas_step(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    bool changed = false;
    for (int32_t i = 0; i < c->n; i++) changed = canvas_take_at(c, i) || changed;
    for (int32_t i = 0; i < c->n; i++) canvas_order_at(c, i);
    canvas_accept(c, s, changed);
    o->canvas_renoise(o, c);
}

void host_canvas_renoise(const ops *o, canvas_buffers *c) {
    (void)o;
    for (int32_t i = 0; i < c->n; i++) canvas_next_at(c, i);
}
