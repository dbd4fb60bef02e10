/* A session: the tokens that were encoded, with their keys and values. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include <stdatomic.h>

#include "scratch.h"

struct dg_session {
    dg_model *model;
    int32_t context, length, rows;
    void **k, **v; /* per layer [context + canvas_length][n_head_kv][head_dim]; rows past length are free */
    scratch scratch; /* for passes of this session alone, of up to `rows` rows */
    scratch shared; /* for passes with rows of other sessions, in which this session is the first */
    int64_t shared_rows; /* the rows that `shared` has memory for */
    void *memory; /* the memory of k and v */
    size_t bytes;
    int64_t counted; /* bytes that this session takes of the model's budget */
    atomic_bool stop; /* dg_session_stop's */
    dg_stop ask; /* dg_session_ask's, or NULL */
    void *ask_user;
    uint64_t asked; /* os_nanoseconds() of the last time */
};

/* Whether the session's passes shall stop. */
bool session_stops(dg_session *s);

/* The scratch of a pass of n rows that this session comes first in: its own, or kept for the next such pass. */
int session_scratch(dg_session *s, int64_t n, scratch **out, dg_error *error);

#endif
