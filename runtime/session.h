/* One timeline over a model: what was encoded, and the room that a pass works in. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include "ops.h"

/* Rows that go through the layers at once: a canvas, or a stretch of a prompt. */
enum { SESSION_ROWS = 256 };

/* Float32 unless said; n is `rows`, the most rows of a pass. */
typedef struct room {
    float *x, *h, *a;          /* [n][d_model] residual stream, normed input, stream after attention */
    float *q, *o;              /* [n][d_q] of the widest layer */
    float *gate, *up;          /* [n][d_ffn] */
    float *dense, *sparse;     /* [n][d_model] outputs of the dense and the expert FFN */
    float *scores, *shares;    /* [n][n_expert], [n][n_expert_used] */
    int32_t *experts;          /* [n][n_expert_used] */
    void *products;            /* matmul_work() bytes */
    void *mixture;             /* experts_work() bytes */
    float *soft;               /* [n][n_vocab] work of the condition op */
} room;

struct dg_session {
    dg_model *model;
    int32_t context, length, rows;
    float **k, **v;            /* per layer [context + canvas_length][n_head_kv][head_dim]; rows past length are scratch */
    room room;
    char *memory;              /* what all of these are carved from; pages are taken when first touched */
    size_t bytes;
};

/* Runs ids[n] (n <= rows) through the encoder behind `length`, leaves their keys and values in the cache and, if asked,
 * the last layer's output in room.x. Does not move length. */
void forward_encode(dg_session *s, const int32_t *ids, int32_t n, bool output);
/* Runs canvas[n] through the decoder behind `length`; the output is in room.x. condition: as dg_denoise. */
void forward_denoise(dg_session *s, const int32_t *canvas, int32_t n, const float *condition);
/* logits[n][n_vocab] of rows [first, first + n) of room.x. Uses room.h. */
void forward_logits(dg_session *s, int32_t first, int32_t n, float *logits);

#endif
