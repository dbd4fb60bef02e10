/* A weight of a model and the weights of a layer, as operations see them. */
#ifndef DG_WEIGHTS_H
#define DG_WEIGHTS_H

#include <stddef.h>

#include "dg.h"

/* A weight as ops see it: `experts` matrices of `rows` rows of `cols` values. y = W x has rows outputs. */
typedef struct tensor {
    const dg_format *format;
    const uint8_t *data;
    int64_t cols, rows, experts;
    int64_t row_bytes, expert_bytes; /* bytes from one row, or one expert, to the next */
    /* the matrices of the first n_repacked experts, in the layout that the backend reads fastest */
    const uint8_t *repacked;
    int64_t n_repacked;
    /* [experts] addresses, `shift` bytes before each expert's first row; NULL: the experts are in data */
    const uint8_t *const *at;
    int64_t shift;
    const uint8_t *placed;           /* the backend's copy, laid out like data; NULL: it reads data */
} tensor;

static inline const uint8_t *tensor_row(const tensor *t, int64_t expert, int64_t row) {
    return (t->at ? t->at[expert] + t->shift : t->data + expert * t->expert_bytes) + row * t->row_bytes;
}

/* Fields are those of tensors.def. A vector of float32 is a tensor of one row. */
#define DG_IF_TOP(x) x
#define DG_IF_LAYER(x)
#define DG_IF_SLIDING(x)
#define DG_IF_SPLIT(x)
typedef struct top_weights {
#define DG_TENSOR(scope, kind, field, gguf, hf, n0, n1, n2) DG_IF_##scope(tensor field;)
#include "tensors.def"
#undef DG_TENSOR
} top_weights;
#undef DG_IF_TOP
#undef DG_IF_LAYER
#undef DG_IF_SLIDING
#undef DG_IF_SPLIT

#define DG_IF_TOP(x)
#define DG_IF_LAYER(x) x
#define DG_IF_SLIDING(x) x
#define DG_IF_SPLIT(x) x
typedef struct layer {
#define DG_TENSOR(scope, kind, field, gguf, hf, n0, n1, n2) DG_IF_##scope(tensor field;)
#include "tensors.def"
#undef DG_TENSOR
    /* ffn_gate_exps and ffn_up_exps are always set: in files with the fused tensor they are views of its halves */
} layer;
#undef DG_IF_TOP
#undef DG_IF_LAYER
#undef DG_IF_SLIDING
#undef DG_IF_SPLIT

/* ---- Lines of tensors.def ---- */

typedef enum weight_scope { WEIGHT_TOP, WEIGHT_LAYER, WEIGHT_SLIDING, WEIGHT_SPLIT } weight_scope;
typedef enum weight_kind { WEIGHT_FLOATS, WEIGHT_MATRIX, WEIGHT_TABLE, WEIGHT_MADE } weight_kind;

typedef struct weight_line {
    weight_scope scope;
    weight_kind kind;
    size_t offset; /* of the tensor in struct top_weights or struct layer */
} weight_line;

enum {
    WEIGHT_LINES = 0
#define DG_TENSOR(scope, kind, field, gguf, hf, n0, n1, n2) +1
#include "tensors.def"
#undef DG_TENSOR
};
extern const weight_line weight_lines[WEIGHT_LINES];

/* A walk over the tensors of a model: line after line of tensors.def, in each layer after layer. It passes over
 * those of sliding layers in full ones, and over the two halves of a fused tensor that is bound. */
typedef struct weight_walk {
    top_weights *top;
    layer *layers;
    const dg_config *config;
    int32_t line, layer; /* those of the last tensor of weight_next; layer is 0 for tensors outside of layers */
    bool begun;
} weight_walk;

/* Begins with the first: `weight_walk w = {.top = ..., .layers = ..., .config = ...}`. NULL past the last. */
tensor *weight_next(weight_walk *w);
/* Whether a tensor is one of its layer's experts' matrices. */
bool weight_of_experts(const weight_walk *w, const tensor *t);

/* Sizes that follow from the configuration, per layer. */
static inline int32_t config_head_dim(const dg_config *c, int32_t l) {
    return c->sliding[l] ? c->head_dim_swa : c->head_dim;
}
static inline int32_t config_d_q(const dg_config *c, int32_t l) { return c->n_head * config_head_dim(c, l); }
static inline int32_t config_d_kv(const dg_config *c, int32_t l) { return c->n_head_kv[l] * config_head_dim(c, l); }

#endif
