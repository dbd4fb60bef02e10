#include "demand.h"

void demand_weights(const dg_model *model, dg_demand *d) {
    *d = (dg_demand){0};
    const dg_config *c = &model->config;
    d->pass_bytes = (int64_t)c->canvas_length * c->d_model * (int64_t)sizeof(float);
    d->n_layer = c->n_layer;
    d->n_expert = c->n_expert;
    int64_t all = 0, experts = 0;
    for (uint64_t i = 0; i < model->file->n_tensors; i++) all += (int64_t)model->file->tensors[i].bytes;
    for (int32_t l = 0; l < c->n_layer; l++) {
        const layer *w = &model->layers[l]; /* gate and up are set in every file: two tensors, or views of one */
        d->block_bytes[l] = (w->ffn_gate_exps.rows * w->ffn_gate_exps.row_bytes) +
                            (w->ffn_up_exps.rows * w->ffn_up_exps.row_bytes) +
                            (w->ffn_down_exps.rows * w->ffn_down_exps.row_bytes);
        experts += d->block_bytes[l] * c->n_expert;
    }
    /* reads alone */
    weight_walk at = {.top = (top_weights *)(uintptr_t)&model->top, .layers = model->layers, .config = c};
    for (const tensor *t; (t = weight_next(&at));)
        if (weight_lines[at.line].scope == WEIGHT_TOP) d->top_bytes += t->row_bytes * t->rows * t->experts;
    d->layer_bytes = all - experts - d->top_bytes;
    const double n = c->canvas_length, width = (double)c->d_model;
    d->block_ops = 6.0 * n * c->n_expert_used / c->n_expert * width * c->d_expert;
    d->top_ops = 2.0 * n * width * c->n_vocab;
    for (int32_t l = 0; l < c->n_layer; l++)
        d->layer_ops +=
            2.0 * n * width *
            (2.0 * config_d_q(c, l) + (c->sliding[l] ? 2.0 : 1.0) * config_d_kv(c, l) + 3.0 * c->d_ffn + c->n_expert);
}
