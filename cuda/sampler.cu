/* A canvas between its steps: random numbers, and what follows from the choices. */
#include "cuda.h"
extern "C" {
#include "random.h"
#include "sampler.h"
}

constexpr int THREADS = 256;

__device__ inline void draw_all(const canvas_buffers &c, const canvas_state &now, int32_t step, int32_t *ids) {
    for (int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); i < c.n;
         i += static_cast<int32_t>(gridDim.x * blockDim.x))
        random_draw(now.seed, static_cast<uint32_t>(now.block), static_cast<uint32_t>(step), static_cast<uint32_t>(i),
                    static_cast<uint32_t>(c.n_vocab), &c.u[i], &ids[i]);
}

__global__ void __launch_bounds__(THREADS) canvas_init_kernel(canvas_buffers c, uint64_t seed, int32_t block) {
    canvas_state now = {};
    now.seed = seed;
    now.block = block;
    draw_all(c, now, 0, c.random_ids);
    /* its own */
    for (int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); i < c.n;
         i += static_cast<int32_t>(gridDim.x * blockDim.x))
        if (c.free == c.n || !c.pins[i]) c.ids[i] = c.random_ids[i];
    if (blockIdx.x == 0 && threadIdx.x == 0) *c.state = now;
}

void cuda_canvas_init(const ops *o, canvas_buffers *c, uint64_t seed, int32_t block) {
    launch(o, "canvas_init")
        .start(canvas_init_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c, seed, block);
}

__global__ void __launch_bounds__(THREADS) canvas_draw_kernel(canvas_buffers c, dg_sampling s) {
    draw_all(c, *c.state, c.state->index + 1, c.random_ids);
    if (blockIdx.x == 0 && threadIdx.x == 0) c.state->temperature = sampler_temperature(&s, c.state->index);
}

void cuda_canvas_draw(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    launch(o, "canvas_draw").start(canvas_draw_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c, *s);
}

/* One block. Sums are one thread's, in the CPU's order: the same bits, and few. */
__global__ void __launch_bounds__(THREADS) canvas_step_kernel(canvas_buffers c, dg_sampling s) {
    DG_SHARED(int32_t, changed, 1);
    if (threadIdx.x == 0) changed[0] = c.state->index == 0;
    block_sync();
    for (int32_t i = threadIdx.x; i < c.n; i += THREADS) {
        if (c.fixed[i]) c.choices[i] = dg_choice{0.0f, c.ids[i], c.ids[i]};
        if (c.argmax[i] != c.choices[i].argmax) atomic_or(changed, 1);
        c.argmax[i] = c.choices[i].argmax;
        c.entropy[i] = c.choices[i].entropy;
    }
    block_sync();
    /* its place in the order of entropy, the lower position first among equals */
    for (int32_t i = threadIdx.x; i < c.n; i += THREADS) {
        /* NaN comes last */
        const auto key = [&](int32_t at) { return c.entropy[at] < INFINITY ? c.entropy[at] : INFINITY; };
        const float mine = key(i);
        int32_t place = 0;
        for (int32_t j = 0; j < c.n; j++) place += key(j) < mine || (key(j) == mine && j < i);
        c.order[place] = i;
    }
    block_sync();
    if (threadIdx.x == 0) {
        double sum = 0.0, before = 0.0;
        for (int32_t i = 0; i < c.n; i++) sum += static_cast<double>(c.entropy[i]);
        for (int32_t i = 0; i < c.n; i++) {
            c.accepted[c.order[i]] = before <= static_cast<double>(s.entropy_bound) || c.fixed[c.order[i]];
            before += static_cast<double>(c.entropy[c.order[i]]);
        }
        canvas_state now = *c.state;
        now.mean_entropy = static_cast<float>(sum / c.free);
        now.unchanged = changed[0] ? 0 : now.unchanged + 1;
        now.converged = sampler_stop(&s, now.unchanged, now.mean_entropy);
        now.index++;
        *c.state = now;
    }
    block_sync();
    for (int32_t i = threadIdx.x; i < c.n; i += THREADS)
        c.ids[i] = c.fixed[i] ? c.argmax[i] : c.accepted[i] ? c.choices[i].sample : c.random_ids[i];
}

void cuda_canvas_step(const ops *o, canvas_buffers *c, const dg_sampling *s) {
    launch(o, "canvas_step").start(canvas_step_kernel, dim3(1), dim3(THREADS), 0, *c, *s);
}

__global__ void __launch_bounds__(THREADS) canvas_renoise_kernel(canvas_buffers c) {
    for (int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); i < c.n;
         i += static_cast<int32_t>(gridDim.x * blockDim.x))
        c.ids[i] = c.fixed[i] ? c.argmax[i] : c.accepted[i] ? c.choices[i].sample : c.random_ids[i];
}

void cuda_canvas_renoise(const ops *o, canvas_buffers *c) {
    launch(o, "canvas_renoise").start(canvas_renoise_kernel, dim3(blocks_for(c->n, THREADS)), dim3(THREADS), 0, *c);
}
