/* A loaded model: its configuration, every weight bound and checked, and the backend that runs it. */
#ifndef DG_MODEL_H
#define DG_MODEL_H

#include "gguf.h"
#include "ops.h"
#include "os.h"
#include "weights.h"

struct stream;
struct budget;
struct vram;
struct decoded;

struct dg_model {
    gguf *file;
    dg_config config;
    top_weights top;
    layer *layers;           /* [n_layer] */
    float *rope_full, *rope_swa; /* [head_dim / 2] inverse frequencies */
    dg_tokenizer *tokenizer;
    struct decoded *decoded; /* float32 values of tensors that are stored otherwise: a list */
    ops *ops;
    _Atomic int64_t *routing; /* [n_layer][n_expert] tokens so far */
    struct stream *stream;   /* where weights come from under a budget, else NULL */
    struct budget *budget;
    dg_ram ram;
    struct vram *vram;       /* of a device's memory: what is taken of it */
};

#endif
