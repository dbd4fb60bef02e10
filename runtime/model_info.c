/* Tells the facts of an open model: its configuration, its weights, where they are, and what its backend measures. */
#include "memory/budget.h"
#include "model.h"

const dg_config *dg_model_config(const dg_model *m) { return &m->config; }
const dg_tokenizer *dg_model_tokenizer(const dg_model *m) { return m->tokenizer; }
const char *dg_model_backend(const dg_model *m) { return m->ops->name; }
int32_t dg_model_threads(const dg_model *m) { return pool_threads(m->ops->pool); }

void dg_model_routing(const dg_model *m, int64_t *counts) {
    m->ops->routing_read(m->ops, counts, m->routing, (int64_t)m->config.n_layer * m->config.n_expert);
}

bool dg_weight_at(const dg_model *model, int32_t i, dg_weight *out) {
    if (i < 0 || (uint64_t)i >= model->file->n_tensors) return false;
    const gguf_tensor *t = &model->file->tensors[i];
    *out = (dg_weight){.type = t->format->id, .bytes = (int64_t)t->bytes};
    for (uint64_t k = 0; k < t->name.n && k < sizeof out->name - 1; k++) out->name[k] = t->name.at[k];
    return true;
}

bool dg_model_placed(const dg_model *m, dg_plan *out) { return budget_placed(m, out); }
void dg_model_prefer(dg_model *m, const int64_t *tokens) { budget_prefer(m, tokens); }
void dg_model_ram(const dg_model *m, dg_ram *out) { *out = m->ram; }
bool dg_model_traffic(const dg_model *m, dg_traffic *out) { return budget_traffic(m, out); }

bool dg_overlap_watch(dg_model *m, bool watch) { return ops_overlap_watch(m->ops, watch); }
bool dg_overlap_read(const dg_model *m, dg_overlap *out) { return ops_overlap_read(m->ops, out); }
bool dg_device_measure(const dg_model *m, dg_device_rates *out) { return ops_device_measure(m->ops, out); }
