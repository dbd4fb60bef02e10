/* Sums the inputs of each matrix by column, for calibration: a layer over the operations that multiply by a matrix. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "model.h"
#include "op_layers.h"

enum { STRIP = 64 /* columns that a thread adds up at a time */ };

/* One matrix, or the matrices of a layer's experts. */
typedef struct slot {
    const tensor *w; /* as the operations are given it */
    char name[64];   /* in the file */
    double *sums;    /* [experts][2][cols] of inputs, and of their squares */
    int64_t *counts; /* [experts] rows that went in */
} slot;

typedef struct activation_stats {
    op_layer layer;
    slot *slots;
    int32_t n_slots;
    bool within; /* an operation made of others is observed once */
    bool failed; /* without memory: an operation cannot say so */
    /* What an expert's rows are gathered and computed again in, for `rows` rows. */
    int64_t rows;
    float *x, *gate, *up;
    void *work;
} activation_stats;

static activation_stats *stats_of(const ops *o) { return (activation_stats *)o->layers[OP_LAYER_ACTIVATION_STATS]; }

static slot *slot_of(const activation_stats *m, const tensor *w) {
    for (int32_t i = 0; i < m->n_slots; i++)
        if (m->slots[i].w == w) return &m->slots[i];
    return NULL;
}

typedef struct adding {
    const float *x;
    double *sums, *squares;
    int64_t n, cols;
} adding;

static void add_strip(void *arg, int64_t item, int32_t thread) {
    const adding *a = arg;
    const int64_t from = item * STRIP, to = from + STRIP < a->cols ? from + STRIP : a->cols;
    (void)thread;
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = from; j < to; j++) {
            const double x = a->x[i * a->cols + j];
            a->sums[j] += x;
            a->squares[j] += x * x;
        }
}

/* Rows in order for every column, so that sums are the same for any number of threads. */
static void observe(const ops *o, slot *s, int64_t expert, const float *x, int64_t n) {
    if (!s || n == 0) return;
    const int64_t cols = s->w->cols;
    double *sums = s->sums + expert * 2 * cols;
    pool_run(o->pool, add_strip, &(adding){.x = x, .sums = sums, .squares = sums + cols, .n = n, .cols = cols},
             (cols + STRIP - 1) / STRIP);
    s->counts[expert] += n;
}

static void observed_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    activation_stats *m = stats_of(o);
    if (!m->within) observe(o, slot_of(m, w), 0, x, n);
    m->layer.below.matmul(o, y, x, w, n, work);
}

static void observed_head(const ops *o, const head_part *parts, int32_t n_parts, const float *x, const tensor *table,
                          int64_t n, float cap, void *work) {
    activation_stats *m = stats_of(o);
    observe(o, slot_of(m, table), 0, x, n);
    m->within = true;
    m->layer.below.head(o, parts, n_parts, x, table, n, cap, work);
    m->within = false;
}

static void free_scratch(activation_stats *m) {
    free(m->x);
    free(m->gate);
    free(m->up);
    free(m->work);
}

static bool make_room(activation_stats *m, const tensor *gate, int64_t n) {
    if (n <= m->rows) return true;
    free_scratch(m);
    m->x = malloc((size_t)(n * gate->cols) * sizeof *m->x);
    m->gate = malloc((size_t)(n * gate->rows) * sizeof *m->gate);
    m->up = malloc((size_t)(n * gate->rows) * sizeof *m->up);
    m->work = malloc(matmul_work(n, gate->cols));
    m->rows = m->x && m->gate && m->up && m->work ? n : 0;
    m->failed |= m->rows == 0;
    return !m->failed;
}

static tensor of_expert(const tensor *w, int64_t expert) {
    tensor one = *w;
    one.data += expert * w->expert_bytes;
    one.experts = 1;
    one.repacked = NULL;
    one.n_repacked = 0;
    return one;
}

/* What goes into `down` is made inside the operation: it is computed again here, by the same products. */
static void observed_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up,
                             const tensor *down, const int32_t *experts, const float *weights, int64_t n, int64_t k,
                             const expert_feed *feed, void *work) {
    activation_stats *m = stats_of(o);
    const int64_t d = gate->cols;
    for (int64_t e = 0; e < gate->experts && make_room(m, gate, n); e++) {
        int64_t rows = 0;
        for (int64_t pair = 0; pair < n * k; pair++)
            if (experts[pair] == e) memcpy(m->x + rows++ * d, x + pair / k * d, (size_t)d * sizeof *x);
        if (rows == 0) continue;
        observe(o, slot_of(m, gate), e, m->x, rows);
        observe(o, slot_of(m, up), e, m->x, rows);
        const tensor its_gate = of_expert(gate, e), its_up = of_expert(up, e);
        m->layer.below.matmul(o, m->gate, m->x, &its_gate, rows, m->work);
        m->layer.below.matmul(o, m->up, m->x, &its_up, rows, m->work);
        m->layer.below.gelu_mul(o, m->gate, m->gate, m->up, rows * gate->rows);
        observe(o, slot_of(m, down), e, m->gate, rows);
    }
    m->within = true;
    m->layer.below.experts(o, y, x, gate, up, down, experts, weights, n, k, feed, work);
    m->within = false;
}

static int add_slot(activation_stats *m, const tensor *w, const char *name, int32_t l, dg_error *error) {
    slot *s = &m->slots[m->n_slots];
    *s = (slot){
        .w = w,
        .sums = calloc((size_t)(w->experts * 2 * w->cols), sizeof *s->sums),
        .counts = calloc((size_t)w->experts, sizeof *s->counts),
    };
    m->n_slots++;
    snprintf(s->name, sizeof s->name, name, l);
    return s->sums && s->counts ? DG_OK : fail(error, DG_ERROR_SYSTEM, "no memory to observe %s", s->name);
}

static int add_slots(dg_model *model, activation_stats *m, dg_error *error) {
    int status = DG_OK;
    weight_walk at = {.top = &model->top, .layers = model->layers, .config = &model->config};
    for (const tensor *w; status == DG_OK && (w = weight_next(&at));) {
        const layer *of = &model->layers[at.layer];
        const weight_kind kind = weight_lines[at.line].kind;
        if (!w->data || (kind != WEIGHT_MATRIX && kind != WEIGHT_TABLE)) continue;
        if (w == &of->ffn_gate_up_exps) w = &of->ffn_gate_exps; /* what the operation is given */
        status = add_slot(m, w, dg_tensor_entry_at(at.line)->gguf, at.layer, error);
    }
    return status;
}

static void activation_stats_free(activation_stats *m) {
    for (int32_t i = 0; i < m->n_slots; i++) {
        free(m->slots[i].sums);
        free(m->slots[i].counts);
    }
    free(m->slots);
    free_scratch(m);
    free(m);
}

static void put_observed(op_table *table) {
    table->matmul = observed_matmul;
    table->experts = observed_experts;
    table->head = observed_head;
}

int dg_moments_start(dg_model *model, dg_error *error) {
    ops *o = model->ops;
    if (o->backend->own_memory)
        return fail(error, DG_ERROR_USAGE, "a model can be observed on the CPU alone, and this one is on %s", o->name);
    if (model->stream)
        return fail(error, DG_ERROR_USAGE, "a model under a RAM budget cannot be observed: its experts pass by once");
    dg_moments_stop(model);
    activation_stats *m = calloc(1, sizeof *m);
    if (m) m->slots = calloc((size_t)(WEIGHT_LINES * (model->config.n_layer + 1)), sizeof *m->slots);
    if (!m) return fail(error, DG_ERROR_SYSTEM, "no memory to observe a model");
    m->layer.replace = put_observed;
    const int status =
        m->slots ? add_slots(model, m, error) : fail(error, DG_ERROR_SYSTEM, "no memory to observe a model");
    if (status != DG_OK) {
        activation_stats_free(m);
        return status;
    }
    op_layer_start(o, OP_LAYER_ACTIVATION_STATS, &m->layer);
    return DG_OK;
}

void dg_moments_stop(dg_model *model) {
    activation_stats *m = stats_of(model->ops);
    if (!m) return;
    op_layer_stop(model->ops, OP_LAYER_ACTIVATION_STATS);
    activation_stats_free(m);
}

int dg_moments_read(const dg_model *model, const char *name, int32_t expert, double *sums, double *squares,
                    int64_t *count, dg_error *error) {
    const activation_stats *m = stats_of(model->ops);
    if (!m) return fail(error, DG_ERROR_USAGE, "this model is not observed");
    if (m->failed) return fail(error, DG_ERROR_SYSTEM, "no memory to observe a model");
    for (int32_t i = 0; i < m->n_slots; i++) {
        const slot *s = &m->slots[i];
        if (strcmp(s->name, name) != 0) continue;
        if (expert < 0 || expert >= s->w->experts)
            return fail(error, DG_ERROR_USAGE, "%s has %d experts, not number %d", name, (int)s->w->experts, expert);
        const size_t cols = (size_t)s->w->cols;
        memcpy(sums, s->sums + (size_t)expert * 2 * cols, cols * sizeof *sums);
        memcpy(squares, s->sums + ((size_t)expert * 2 + 1) * cols, cols * sizeof *squares);
        *count = s->counts[expert];
        return DG_OK;
    }
    return fail(error, DG_ERROR_USAGE, "no matrix of this model is called '%.60s'", name);
}
