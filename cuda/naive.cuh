/* Products in float32 with weights of any format, which are decoded on the fly: for all shapes and exact, but slow. */
#ifndef DG_CUDA_NAIVE_H
#define DG_CUDA_NAIVE_H

#include "cuda.h"
#include "formats.cuh"
#include "expert_offload.cuh"

/* A block of NAIVE_THREADS makes NAIVE x NAIVE results, NAIVE_STEP columns at a time. */
constexpr int NAIVE = 16, NAIVE_THREADS = 128, NAIVE_STEP = 256, NAIVE_PITCH = NAIVE_STEP + 1;

/* sum[0], sum[1] += of row threadIdx.x % 16 of `rows` weight rows with x rows threadIdx.x / 16 and that + 8. x_of(i)
 * is row i's start, NULL where there is none. room_w, room_x: [NAIVE * NAIVE_PITCH], shared. Every thread of the
 * block comes here. */
template <class F, class X>
__device__ inline void naive_tile(float (&sum)[2], const typename F::block *w, int64_t cols, int64_t rows, X x_of,
                                  float *room_w, float *room_x) {
    const int row = threadIdx.x % NAIVE, token = threadIdx.x / NAIVE;
    const int64_t row_blocks = cols / F::VALUES;
    for (int64_t from = 0; from < cols; from += NAIVE_STEP) {
        const int width = static_cast<int>(cols - from < NAIVE_STEP ? cols - from : NAIVE_STEP),
                  per_row = width / F::VALUES;
        for (int i = threadIdx.x; i < NAIVE * per_row; i += NAIVE_THREADS) {
            const int r = i % NAIVE, b = i / NAIVE;
            if (r < rows)
                F::decode(w + r * row_blocks + from / F::VALUES + b, room_w + r * NAIVE_PITCH + b * F::VALUES);
        }
        for (int i = 0; i < NAIVE; i++) {
            const float *x = x_of(i);
            for (int j = threadIdx.x; j < width; j += NAIVE_THREADS)
                room_x[i * NAIVE_PITCH + j] = x ? x[from + j] : 0.0f;
        }
        block_sync();
        if (row < rows)
            for (int j = 0; j < width; j++) {
                const float v = room_w[row * NAIVE_PITCH + j];
                sum[0] = fmaf(v, room_x[token * NAIVE_PITCH + j], sum[0]);
                sum[1] = fmaf(v, room_x[(token + NAIVE / 2) * NAIVE_PITCH + j], sum[1]);
            }
        block_sync();
    }
}

/* y[n][w->rows] = x W^T; count: NULL, or where the device finds how many of the n rows there are. */
void naive_matmul(const launch &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *count);
/* The same for all rows, each sum of float32 weights split among warps: as the router's few rows need. */
void split_matmul(const launch &t, float *y, const float *x, const tensor *w, int64_t n);
/* As matmul_gathered. */
void naive_gathered(const launch &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n);

/* ---- Experts ---- */

/* The (token, slot) pairs of each expert, computed on the device: pairs[start[e] .. start[e + 1]) = token * k + slot in
 * rising order. tiles[i] = {expert, first place in pairs} for each run of at most `height` pairs; the expert is -1
 * after the last run. */
struct expert_order {
    int32_t *start; /* [n_expert + 1] */
    int32_t *pairs; /* [n * k] */
    int2 *tiles;    /* [most_tiles] */
    int32_t most_tiles;
};
/* Bytes of it, and its arrays in `memory`; heights of 16 and more. */
size_t expert_order_bytes(int64_t n_pairs, int64_t n_expert);
expert_order order_experts(const launch &t, void *memory, const int32_t *experts, int64_t n_pairs, int64_t n_expert,
                           int32_t height);
/* y[i][d] = sum over slots, in order, of weights[i][s] * out[i * k + s][d], those of the device's experts, behind
 * what y has, if it has the CPU's */
void combine_experts(const launch &t, float *y, const float *out, const int32_t *experts, const float *weights,
                     int64_t n, int64_t k, int64_t d, portion here, bool more);

void naive_experts(const launch &t, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                   const int32_t *experts, const float *weights, int64_t n, int64_t k, void *work);

#endif
