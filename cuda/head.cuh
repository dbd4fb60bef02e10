/* Shared by the output head and self-conditioning: both walk over the vocabulary a stretch at a time, in the buffers
 * of one self_cond, so that logits need room for a stretch alone.
 *
 * What is in the buffers, from the head of a step (head.cu) to the self-conditioning of the next (self_condition.cu):
 *
 *                 head:                                                self_condition:
 *                 each stretch      merge          draw                sparse         each stretch, of dense rows
 *   x             the rows                                                            read
 *   z             its logits                       logits of a chunk                  its logits, then their shares
 *   parts         its chunks        read           read
 *   lists         its groups        read                                              sums of the splits after the
 * first chunks, aims                    written        read ids, shares, counts, dropped    written read
 *
 * Merge is the last to read the lists. Self-conditioning writes its sums over them, and over z, before the next head
 * writes both anew. */
#ifndef DG_CUDA_HEAD_H
#define DG_CUDA_HEAD_H

#include "matmul.cuh"

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline unsigned rows_of(int64_t n) { return static_cast<unsigned>(n); }

/* The rows [first, first + SELF_COND_STRETCH) of a table, as a matrix of its own. */
static inline tensor stretch_of(const tensor *table, int64_t first) {
    tensor view = *table;
    view.rows = least(SELF_COND_STRETCH, table->rows - first);
    view.placed += first * table->row_bytes;
    return view;
}

/* A logit softcapped and divided by the temperature. Infinity becomes NaN: it is not hidden. */
__device__ inline float scaled(float logit, float cap, float temperature) {
    return (cap * tanhf(logit / cap) + (logit - logit)) / temperature;
}

/* Finds the length of the table's longest row, of which self-conditioning needs the square in t.g->longest; nothing
 * where it is known already. */
void find_longest(const launch &t, const tensor *table);

#endif
