/* Timelines over a model, and passes through its layers. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include "ops.h"

/* Rows of a session's own passes: a canvas, or a stretch of a prompt. */
enum { SESSION_ROWS = 256 };

/* What a pass of up to n rows works in. Float32 unless said. */
typedef struct room {
    float *x, *h, *a;          /* [n][d_model] residual stream, normed input, stream after attention */
    float *q, *o;              /* [n][d_q] of the widest layer */
    float *k, *v;              /* [n][d_kv] of the widest layer */
    float *gate, *up;          /* [n][d_ffn] */
    float *dense, *sparse;     /* [n][d_model] outputs of the dense and the expert FFN */
    float *scores, *shares;    /* [n][n_expert], [n][n_expert_used] */
    int32_t *experts;          /* [n][n_expert_used] */
    int32_t *ids;              /* [n] what the pass reads */
    void *products;            /* matmul_work() and soften_work() bytes */
    void *mixture;             /* experts_work() bytes */
    float *vocabulary;         /* room of the condition, soften and logits ops */
    int32_t *found;            /* [1] where the pass first met NaN or infinity: 1 + layer * stages + stage; 0: nowhere */
    void *memory;              /* what all of these are carved from: the backend's */
    size_t bytes;
} room;

int room_new(const dg_model *model, int64_t n, room *r, dg_error *error);
void room_free(const dg_model *model, room *r);

/* Checks a session's length in tokens, and sets it where it is 0: the longest that is usual and that there is room for. */
int session_context(const dg_model *model, int32_t *context, dg_error *error);
/* Bytes of a session: keys and values, what its passes work in, and what a canvas of it keeps from step to step. */
int32_t session_rows(const dg_model *model); /* of its passes, at most */
int64_t session_cache_bytes(const dg_model *model, int32_t context);
int64_t session_room_bytes(const dg_model *model);
int64_t session_canvas_bytes(const dg_model *model);
int64_t session_bytes(const dg_model *model, int32_t context); /* all three */

struct dg_session {
    dg_model *model;
    int32_t context, length, rows;
    void **k, **v;             /* per layer [context + canvas_length][n_head_kv][head_dim]; rows past length are scratch */
    room room;                 /* for `rows` rows */
    room together;             /* for passes with other sessions' rows that this one comes first in, as large as was needed */
    int64_t together_rows;
    void *memory;              /* the caches */
    size_t bytes;
    int64_t counted;           /* of the model's budget */
};

/* Room for a pass of n rows that this session comes first in: its own, or kept for the next such pass. */
int session_room(dg_session *s, int64_t n, room **out, dg_error *error);

/* One session's rows in a pass. A canvas is conditioned on scaled logits (as dg_denoise), or on what forward_choose left
 * in *last, or on nothing where both are NULL. */
typedef struct pass_part {
    dg_session *session;
    int32_t n;
    const float *condition;
    const soft *last;
} pass_part;

/* Rows that go through the layers together: the parts' one after another. Experts and matrices see them all, attention
 * keeps the sessions apart. */
typedef struct pass {
    const dg_model *model;
    room *room;
    const pass_part *parts;
    int32_t n_parts;
    int64_t n;
    float *hidden; /* NULL, or [n_layer + 1][n][d_model]: where the decoder leaves what each layer reads, and the last one's output */
    bool closely;  /* every stage of stages.def is watched */
    bool later;    /* what was found is asked for once the step is over: forward_verdict */
} pass;

/* Passes fail where weights cannot be read (DG_ERROR_SYSTEM) or where NaN or infinity comes up (DG_ERROR_NUMBERS, naming the
 * layer and what was computed); what they leave in rooms is then of no use.
 * Runs ids[n] through the encoder behind each part's length, leaves their keys and values in the caches and, if asked,
 * the last layer's output in room.x. Does not move lengths. */
int forward_encode(const pass *p, const int32_t *ids, bool output, dg_error *error);
/* Runs the canvases of room.ids through the decoder behind each part's length; the output is in room.x. */
int forward_denoise(const pass *p, dg_error *error);
/* The choices of room.x, each part's in parts[i], whose n is that of pass_part i. Uses room.h. */
int forward_choose(const pass *p, const head_part *parts, dg_error *error);
/* What a pass and its choices were worth that looked at nothing itself; argmax[n] of its rows. Uses room.h. */
int forward_verdict(const pass *p, const int32_t *argmax, dg_error *error);
/* logits[n][n_vocab] of rows [first, first + n) of room.x. Uses room.h. */
int forward_logits(const pass *p, int64_t first, int64_t n, float *logits, dg_error *error);

#endif
