#include "weights.h"

const weight_line weight_lines[WEIGHT_LINES] = {
#define HOLDER_TOP top_weights
#define HOLDER_LAYER layer
#define HOLDER_SLIDING layer
#define HOLDER_SPLIT layer
#define DG_TENSOR(of, type, field, gguf, hf, n0, n1, n2) \
    {.scope = WEIGHT_##of, .kind = WEIGHT_##type, .offset = offsetof(HOLDER_##of, field)},
#include "tensors.def"
#undef DG_TENSOR
};

/* Moves on to the next layer of a line, or to the next line. */
static void step(weight_walk *w) {
    const int32_t n = weight_lines[w->line].scope == WEIGHT_TOP ? 1 : w->config->n_layer;
    if (!w->begun) w->begun = true;
    else w->layer++;
    if (w->layer < n) return;
    w->layer = 0;
    w->line++;
}

/* Whether the model has the tensor that the walk stands at. */
static bool has(const weight_walk *w) {
    const weight_scope scope = weight_lines[w->line].scope;
    if (scope == WEIGHT_SLIDING) return w->config->sliding[w->layer];
    return scope != WEIGHT_SPLIT || !w->layers[w->layer].ffn_gate_up_exps.data;
}

tensor *weight_next(weight_walk *w) {
    do {
        step(w);
        if (w->line == WEIGHT_LINES) return NULL;
    } while (!has(w));
    const weight_line *line = &weight_lines[w->line];
    char *holder = line->scope == WEIGHT_TOP ? (char *)w->top : (char *)&w->layers[w->layer];
    return (tensor *)(void *)(holder + line->offset);
}

bool weight_of_experts(const weight_walk *w, const tensor *t) {
    const layer *l = &w->layers[w->layer];
    return t == &l->ffn_gate_up_exps || t == &l->ffn_gate_exps || t == &l->ffn_up_exps || t == &l->ffn_down_exps;
}
