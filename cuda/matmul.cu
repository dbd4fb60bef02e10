/* The matmul op: which kernel multiplies which format. */
#include "matmul.cuh"
#include "plain.cuh"

void cuda_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    (void)work;
    plain_matmul(turn(o, "matmul"), y, x, w, n, nullptr);
}

void matmul_gathered(const turn &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n, void *work) {
    (void)work;
    plain_gathered(t, z, x, table, chunks, n);
}
