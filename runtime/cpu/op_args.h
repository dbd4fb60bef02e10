/* Arguments of operations for the threads of a pool, which the plain operations and the instruction sets' share. */
#ifndef DG_OP_ARGS_H
#define DG_OP_ARGS_H

#include "ops.h"

/* embed, rms_norm, ...: [n][d] */
typedef struct row_args {
    float *y;
    const float *x, *weight;
    const tensor *table;
    const int32_t *ids;
    int64_t n, d, block; /* rows; columns; rows per item */
    float number;        /* the operation's scale or epsilon */
} row_args;

/* rope: x[n][heads][dim], row 0 at position `first` */
typedef struct rope_args {
    float *x;
    int64_t heads, dim, first;
    const float *inverse_frequency;
} rope_args;

/* choose: z[n][n_vocab], u[n], out[n] */
typedef struct choose_args {
    dg_choice *out;
    const float *z;
    int64_t n_vocab;
    const double *u;
} choose_args;

#endif
