/* A pass: the rows (tokens or canvases) of one or more sessions go through the layers together. */
#ifndef DG_FORWARD_H
#define DG_FORWARD_H

#include "session.h"

/* One session's rows in a pass. A canvas is conditioned on scaled logits (as in dg_denoise), or on what
 * forward_choose left in *last, or on nothing where both are NULL. */
typedef struct pass_part {
    dg_session *session;
    int32_t n;
    const float *condition;
    const self_cond *last;
} pass_part;

/* The rows of all parts, one part after the other. Matrices and experts are applied to all rows together, attention to
 * each session separately. */
typedef struct pass {
    const dg_model *model;
    scratch *scratch;
    const pass_part *parts;
    int32_t n_parts;
    int64_t n;     /* rows of all parts */
    /* NULL, or [n_layer + 1][n][d_model]: the decoder writes the input of each layer and the output of the last one */
    float *hidden;
    bool closely; /* everything in finite_checks.def is checked */
    bool later; /* the result of the checks is read by forward_verdict after the step, not at the end of the pass */
} pass;

/* A pass fails where weights cannot be read (DG_ERROR_SYSTEM), or where NaN or infinity comes up (DG_ERROR_NUMBERS,
 * naming the layer and what was computed). The scratch memory of a failed pass has no valid content. */

/* Runs ids[n] through the encoder, behind each part's length. Writes their keys and values to the caches and, with
 * `output`, the last layer's output to scratch.x. Does not change the lengths. */
int forward_encode(const pass *p, const int32_t *ids, bool output, dg_error *error);
/* Runs the canvases of scratch.ids through the decoder behind each part's length; the output is in scratch.x. */
int forward_denoise(const pass *p, dg_error *error);
/* The choices of scratch.x, each part's in parts[i], whose n is that of pass_part i. Uses scratch.h. */
int forward_choose(const pass *p, const head_part *parts, dg_error *error);
/* Checks a pass that put its check off (`later`), and its choices: argmax[n] of its rows. Uses scratch.h. */
int forward_verdict(const pass *p, const int32_t *argmax, dg_error *error);
/* logits[n][n_vocab] of rows [first, first + n) of scratch.x. Uses scratch.h. */
int forward_logits(const pass *p, int64_t first, int64_t n, float *logits, dg_error *error);

#endif
