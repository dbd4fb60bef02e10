/* The canvas ops: a thread per position, and what canvas_position.h does with it. */
#include "cuda.h"
extern "C" {
#include "canvas_position.h"
}

constexpr int THREADS = 256;

/* The positions of this thread, in a grid of one dimension. */
template <class At> __device__ inline void each_position(int32_t n, At at) {
    const int32_t threads = static_cast<int32_t>(gridDim.x * blockDim.x);
    for (int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += threads) at(i);
}

__global__ void __launch_bounds__(THREADS) canvas_init_kernel(canvas_buffers c, uint64_t seed, int32_t block) {
    canvas_state now = {};
    now.seed = seed;
    now.block = block;
    each_position(c.n, [&](int32_t i) { canvas_init_at(&c, &now, i); });
    if (blockIdx.x == 0 && threadIdx.x == 0) *c.state = now;
}

void cuda_canvas_init(const ops *o, canvas_buffers *c, uint64_t seed, int32_t block) {
    launch(o, "canvas_init")
        .start(canvas_init_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c, seed, block);
}

__global__ void __launch_bounds__(THREADS) canvas_draw_kernel(canvas_buffers c, dg_sampling s) {
    each_position(c.n, [&](int32_t i) { canvas_draw_at(&c, c.state, c.state->index + 1, i); });
    if (blockIdx.x == 0 && threadIdx.x == 0) c.state->temperature = sampler_temperature(&s, c.state->index);
}

void cuda_canvas_draw(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    launch(o, "canvas_draw").start(canvas_draw_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c, *s);
}

/* One block: all positions pass each stage before the next begins. */
__global__ void __launch_bounds__(THREADS) canvas_step_kernel(canvas_buffers c, dg_sampling s) {
    DG_SHARED(int32_t, changed, 1);
    if (threadIdx.x == 0) changed[0] = 0;
    block_sync();
    each_position(c.n, [&](int32_t i) {
        if (canvas_take_at(&c, i)) atomic_or(changed, 1);
    });
    block_sync();
    each_position(c.n, [&](int32_t i) { canvas_order_at(&c, i); });
    block_sync();
    if (threadIdx.x == 0) canvas_accept(&c, &s, changed[0] != 0);
    block_sync();
    each_position(c.n, [&](int32_t i) { canvas_next_at(&c, i); });
}

void cuda_canvas_step(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    launch(o, "canvas_step").start(canvas_step_kernel, dim3(1), dim3(THREADS), 0, *c, *s);
}

__global__ void __launch_bounds__(THREADS) canvas_renoise_kernel(canvas_buffers c) {
    each_position(c.n, [&](int32_t i) { canvas_next_at(&c, i); });
}

void cuda_canvas_renoise(const ops *o, canvas_buffers *c) {
    launch(o, "canvas_renoise").start(canvas_renoise_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c);
}
