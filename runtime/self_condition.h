/* The state from which the next denoising step computes its self-conditioning: the softmax of the scaled logits of each
 * row. */
#ifndef DG_SELF_CONDITION_H
#define DG_SELF_CONDITION_H

#include "dg.h"

enum {
    SELF_COND_CHUNK = 256, /* ids of the vocabulary that share one partial sum */
    SELF_COND_STRETCH = 8192, /* ids whose logits are in memory at a time, in backends without lazy memory */
    SELF_COND_GROUP = 2048, /* ids that one thread computes in order; it keeps the likely ones of them */
    SELF_COND_GROUP_IDS = 96, /* the most likely ids that are kept of a group */
    SELF_COND_IDS = 4096, /* the most likely ids that are kept of a row */
};

/* Sums over a chunk of a row's scaled logits z. */
typedef struct self_cond_part {
    float peak; /* the largest z */
    float total; /* the sum of exp(z - peak) */
    float moment; /* the sum of (z - peak) exp(z - peak) */
} self_cond_part;

/* The likely ids of a row in one group. */
typedef struct self_cond_list {
    int32_t count;
    int32_t ids[SELF_COND_GROUP_IDS];
    float z[SELF_COND_GROUP_IDS]; /* their scaled logits */
} self_cond_list;

/* The operation `head` fills it, and `self_condition` reads it. Exact backends store all scaled logits, fast ones the
 * likely ids and the probability of all others together. Memory pages are taken when they are first written. */
typedef struct self_cond {
    int64_t n, n_vocab, d; /* rows of the canvas, ids, columns of the embedding */
    bool started; /* whether a step was taken since the canvas began */
    const bool *pinned; /* [n] rows with a given id, which have no softmax; NULL: none */
    const int32_t *given; /* [n] the ids of pinned rows, to condition on; NULL: pinned rows have no condition */
    float cap; /* softcap */
    const float *temperature; /* the temperature of the last head; the caller keeps it until self_condition */
    float *z; /* [n][n_vocab] scaled logits, or [n][SELF_COND_STRETCH] */
    float *x; /* [n][d] the input of the last head */
    int32_t *argmax; /* [n] the best id at the last step */
    float *floors; /* [n] a lower bound of the row's largest scaled logit */
    self_cond_part *parts; /* [chunks][n] partial sums */
    self_cond_list *lists; /* [groups][n] likely ids, for head; self_condition may overwrite them */
    int32_t *counts; /* [n] the number of likely ids */
    int32_t *ids; /* [n][SELF_COND_IDS] the likely ids */
    float *shares; /* [n][SELF_COND_IDS] their probabilities, softmax(z) */
    double *dropped; /* [n] the probability of all other ids together */
    int32_t *chunks; /* [n] the chunk that has the sampled id */
    double *aims; /* [n] the cumulative sum in this chunk at which the id is sampled */
    size_t bytes; /* bytes of all arrays */
    void *memory; /* the memory of all arrays */
} self_cond;

/* Lays the arrays for n rows out in `memory`. With NULL it only computes s->bytes. */
void self_cond_lay_out(self_cond *s, int64_t n, int64_t n_vocab, int64_t d, bool whole_logits, void *memory);

#endif
