/* The experts op: which kernels multiply which formats. */
#include "plain.cuh"

void cuda_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down, const int32_t *experts,
                  const float *weights, int64_t n, int64_t k, void *work) {
    plain_experts(turn(o, "experts"), y, x, gate, up, down, experts, weights, n, k, work);
}
