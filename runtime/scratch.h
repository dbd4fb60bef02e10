/* The memory of sessions and passes: its layout, and its size in bytes. */
#ifndef DG_SCRATCH_H
#define DG_SCRATCH_H

#include "model.h"

/* The arrays for a pass of up to n rows. */
typedef struct scratch {
    float *x, *h, *a;          /* [n][d_model] residual stream, normed input, stream after attention */
    float *q, *o;              /* [n][d_q] of the widest layer */
    float *k, *v;              /* [n][d_kv] of the widest layer */
    float *gate, *up;          /* [n][d_ffn] */
    float *dense, *sparse;     /* [n][d_model] outputs of the dense and the expert FFN */
    float *scores, *shares;    /* [n][n_expert], [n][n_expert_used] */
    int32_t *experts;          /* [n][n_expert_used] */
    int32_t *ids;              /* [n] the input of the pass */
    void *products;            /* matmul_work() and self_condition_work() bytes */
    void *mixture;             /* experts_work() bytes */
    float *vocabulary;         /* work of the self_condition_dense, self_condition and logits ops */
    /* [1] where the pass first met NaN or infinity: 1 + layer * checks + check; 0: nowhere */
    int32_t *nonfinite;
    void *memory;              /* what all of these are carved from: the backend's */
    size_t bytes;
} scratch;

int scratch_new(const dg_model *model, int64_t n, scratch *s, dg_error *error);
void scratch_free(const dg_model *model, scratch *s);

/* The most rows of a pass of one session: a canvas, or a chunk of a prompt. */
int32_t scratch_rows(const dg_model *model);

/* Lays out the keys and values of a session of `context` tokens: k[n_layer] and v[n_layer]. Returns the bytes they
 * take; memory NULL: only counts. */
size_t scratch_cache(const dg_model *model, int32_t context, void *memory, void **k, void **v);

/* Bytes of the keys and values, of a pass of n rows, of what a canvas keeps from step to step, and of a whole
 * session. */
int64_t scratch_cache_bytes(const dg_model *model, int32_t context);
int64_t scratch_pass_bytes(const dg_model *model, int64_t n);
int64_t scratch_canvas_bytes(const dg_model *model);
int64_t scratch_session_bytes(const dg_model *model, int32_t context);

#endif
