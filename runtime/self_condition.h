/* The state that a denoising step leaves for the self-conditioning of the next: the softmax of every row's scaled
 * logits. */
#ifndef DG_SELF_CONDITION_H
#define DG_SELF_CONDITION_H

#include "dg.h"

enum {
    SELF_COND_CHUNK = 256,     /* vocabulary that shares one partial sum */
    SELF_COND_STRETCH = 8192,  /* vocabulary whose logits lie beside each other where memory is not lazy */
    SELF_COND_GROUP = 2048,    /* vocabulary that one thread passes in order, keeping its likely ids */
    SELF_COND_GROUP_IDS = 96,  /* most ids kept of a group */
    SELF_COND_IDS = 4096,      /* most ids kept of a row */
};

/* Sums over a chunk of a row's scaled logits, against the chunk's own peak: exp(z - peak), and (z - peak) of that. */
typedef struct self_cond_part {
    float peak, total, moment;
} self_cond_part;

typedef struct self_cond_list {
    int32_t count;
    int32_t ids[SELF_COND_GROUP_IDS];
    float z[SELF_COND_GROUP_IDS];
} self_cond_list;

/* A table of operations fills it in its head op and reads it in its self_condition op, each in its own way: exact
 * ones keep all scaled logits, fast ones the likely ids and the share of all others. Memory is taken when touched. */
typedef struct self_cond {
    int64_t n, n_vocab, d;
    bool started;       /* a step was taken: ids hold its choices */
    const bool *pinned; /* [n] rows that are given, so not of the softmax; NULL: none */
    const int32_t *given; /* [n] the ids that stand in such rows, to condition on; NULL: on nothing */
    float cap;
    const float *temperature; /* as head had it: the caller's, unchanged until self_condition */
    float *z;           /* [n][n_vocab], or of a stretch */
    float *x;           /* [n][d] the rows that the head saw */
    int32_t *argmax;    /* [n] of the last step */
    float *floors;      /* [n] what a row's peak is at least */
    self_cond_part *parts;   /* [chunks][n] */
    self_cond_list *lists;   /* [groups][n] for head; self_condition may write over them */
    int32_t *counts;    /* [n] */
    int32_t *ids;       /* [n][SELF_COND_IDS] */
    float *shares;      /* [n][SELF_COND_IDS] of softmax(z) */
    double *dropped;    /* [n] the share of the ids that are not there */
    int32_t *chunks;    /* [n] the chunk that a row's draw falls into */
    double *aims;       /* [n] and how far */
    size_t bytes;
    void *memory;
} self_cond;

/* Lays the arrays for n rows out in `memory`. It may be NULL: then s->bytes says how much they need. */
void self_cond_lay_out(self_cond *s, int64_t n, int64_t n_vocab, int64_t d, bool whole_logits, void *memory);

#endif
