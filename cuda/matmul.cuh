/* Products that ops other than matmul need. */
#ifndef DG_CUDA_MATMUL_H
#define DG_CUDA_MATMUL_H

#include "cuda.h"

/* z[n][SELF_COND_CHUNK] = of row i of x with the rows of table in chunk chunks[i] of SELF_COND_CHUNK rows; what is
 * past the table's end is left. Each number is that of matmul_counted, to the bit. work: matmul_work() bytes. */
void matmul_gathered(const launch &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n,
                     void *work);

/* The matmul op for the first *count (on the device) of n rows, or NULL for all; sums of float32 weights are not
 * split. */
void matmul_counted(const launch &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *count,
                    void *work);

#endif
