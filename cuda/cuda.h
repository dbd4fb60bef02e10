/* What the op families of this folder share: the device that a table of operations works on. */
#ifndef DG_CUDA_H
#define DG_CUDA_H

#include <mutex>

#include "device.h"

/* The C headers, as C++ reads them; nothing here touches what is atomic. */
#define _Atomic
#define _Thread_local thread_local
extern "C" {
#include "ops.h"
#define DG_OP(name, arguments, names) void cuda_##name arguments;
#include "ops.def"
#undef DG_OP
}
#undef _Atomic
#undef _Thread_local

struct placed_weight;
struct expert_offload;

struct gpu {
    cudaStream_t stream;        /* of all ops */
    int32_t architecture;       /* 75, 80, ... */
    int32_t processors;
    bool exact;                 /* activations are never rounded to fewer bits */
    cudaError_t failure;        /* the first, and the op that met it; nothing is started after it */
    const char *failed;
    bool recording;
    int32_t *longest;           /* of the table longest_of: the square of its longest row's length, a float */
    const void *longest_of;
    expert_offload *offload;    /* where experts are, once they were placed */
    placed_weight *weights;     /* copies of the file's, WEIGHT_MARGIN bytes longer: loads may run over the end */
    void *staging;              /* page-locked, STAGING bytes: small copies to the caller */
    std::recursive_mutex mutex; /* held while an op starts, and from graph_begin to graph_end */
    int32_t forks; /* os_forks() of the process that opened it: a child can use neither device nor lock */

    bool forked() const { return os_forks() != forks; }
    void lock() {
        if (!forked()) {
            mutex.lock();
            return;
        }
        failure = cudaErrorInitializationError;
        failed = "a model on a GPU cannot be used in a forked process";
    }
    void unlock() {
        if (!forked()) mutex.unlock();
    }
};
enum { STAGING = 1 << 16, WEIGHT_MARGIN = 256 };

static inline gpu *gpu_of(const ops *o) { return static_cast<gpu *>(o->device); }

/* Keeps the first failure; true if all is well. */
bool gpu_check(gpu *g, cudaError_t status, const char *op);

/* Launches the kernels of an op: `const launch t(o, "matmul");`, then t.start(kernel, grid, block, shared,
 * arguments...). */
struct launch {
    gpu *g;
    const char *op;
    launch(const ops *o, const char *name) : g(gpu_of(o)), op(name) { g->lock(); }
    ~launch() { g->unlock(); }
    launch(const launch &) = delete;
    launch &operator=(const launch &) = delete;

    template <class... P, class... A>
    void start(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) const {
        if (g->failure == cudaSuccess && grid.x && grid.y && grid.z)
            gpu_check(g, dg_launch(kernel, grid, block, shared, g->stream, arguments...), op);
    }
};

static inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

#endif
