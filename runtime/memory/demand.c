#include "demand.h"

#include <string.h>

#include "os.h"
#include "scratch.h"
#include "stream.h"

#define MIB (1 << 20)
enum {
    PROCESS = 192 * MIB, /* code, tokenizer and Python: dg-run takes half of it, on the way to an answer too */
    GROWTH = 48 * MIB,   /* what a process that holds more than usual takes later: Python's modules, for one */
};

/* ---- Tensors ---- */

/* Experts by their names in tensors.def: repacked ones lie elsewhere. */
static bool is_expert(const gguf_tensor *t) {
    static const char END[] = "_exps.weight";
    const uint64_t n = sizeof END - 1;
    return t->name.n > n && memcmp(t->name.at + t->name.n - n, END, n) == 0;
}

int32_t demand_layer(const gguf_tensor *t) {
    int32_t l = 0;
    uint64_t i = 4;
    if (t->name.n < 5 || memcmp(t->name.at, "blk.", 4) != 0) return -1;
    for (; i < t->name.n && t->name.at[i] >= '0' && t->name.at[i] <= '9'; i++) l = l * 10 + (t->name.at[i] - '0');
    return l;
}

bool demand_stays(const dg_model *m, const gguf_tensor *t) {
    return demand_layer(t) < m->config.n_layer && !is_expert(t);
}

static int64_t matrix_bytes(const tensor *t) { return t->rows * t->row_bytes; }

static int64_t room(int64_t bytes, bool direct) { return direct ? stream_room(bytes) : bytes; }

/* One expert of a layer. Gate and up are set in every file: two tensors, or views of one. */
static int64_t block_bytes(const layer *w, bool direct) {
    const int64_t gate = matrix_bytes(&w->ffn_gate_exps), up = matrix_bytes(&w->ffn_up_exps);
    const bool fused = w->ffn_gate_up_exps.data != NULL;
    const int64_t both = fused ? room(gate + up, direct) : room(gate, direct) + room(up, direct);
    return both + room(matrix_bytes(&w->ffn_down_exps), direct);
}

/* ---- Demands ---- */

void demand_weights(const dg_model *model, bool direct, dg_demand *d) {
    *d = (dg_demand){0};
    const dg_config *c = &model->config;
    d->pass_bytes = (int64_t)c->canvas_length * c->d_model * (int64_t)sizeof(float);
    d->n_layer = c->n_layer;
    d->n_expert = c->n_expert;
    d->process_bytes = PROCESS;
    for (int32_t l = 0; l < c->n_layer; l++) d->block_bytes[l] = block_bytes(&model->layers[l], direct);
    for (uint64_t i = 0; i < model->file->n_tensors; i++) {
        const gguf_tensor *t = &model->file->tensors[i];
        if (!demand_stays(model, t)) continue;
        if (demand_layer(t) < 0) d->top_bytes += room((int64_t)t->bytes, direct);
        else d->layer_bytes += room((int64_t)t->bytes, direct);
    }
    const double n = c->canvas_length, width = (double)c->d_model;
    d->block_ops = 6.0 * n * c->n_expert_used / c->n_expert * width * c->d_expert;
    d->top_ops = 2.0 * n * width * c->n_vocab;
    for (int32_t l = 0; l < c->n_layer; l++)
        d->layer_ops +=
            2.0 * n * width *
            (2.0 * config_d_q(c, l) + (c->sliding[l] ? 2.0 : 1.0) * config_d_kv(c, l) + 3.0 * c->d_ffn + c->n_expert);
}

void demand_session(const dg_model *model, int32_t context, bool direct, dg_demand *d) {
    demand_weights(model, direct, d);
    d->context = context;
    d->process_bytes = demand_process(model, 0);
    d->cache_bytes = scratch_cache_bytes(model, context);
    d->work_bytes = scratch_pass_bytes(model, scratch_rows(model));
    d->canvas_bytes = scratch_canvas_bytes(model);
}

int32_t demand_context(const dg_model *model) {
    const int32_t most = model->config.context_length;
    return most < DG_PLAN_CONTEXT ? most : DG_PLAN_CONTEXT;
}

int64_t demand_process(const dg_model *model, int64_t held) {
    return (held + GROWTH > PROCESS ? held + GROWTH : PROCESS) + ops_scratch_bytes(model->ops);
}
