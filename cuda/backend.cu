/* The device itself: opening it, its memory, copies, recordings, and the table of operations. */
#include "cuda.h"

#include <atomic>
#include <new>
#include <stdio.h>
#include <string.h>

#include "backend.h"
#include "expert_offload.cuh"
extern "C" {
#include "error.h"
}

enum { LEAST_ARCHITECTURE = 75 };

bool gpu_check(gpu *g, cudaError_t status, const char *op) {
    if (status == cudaSuccess) return g->failure == cudaSuccess;
    if (g->failure == cudaSuccess) {
        g->failure = status;
        g->failed = op;
    }
    cudaGetLastError(); /* it is kept here */
    return false;
}

int cuda_status(const ops *o, dg_error *error) {
    gpu *g = gpu_of(o);
    const std::lock_guard<gpu> lock(*g);
    if (g->failure == cudaSuccess) return DG_OK;
    return fail(error, g->failure == cudaErrorMemoryAllocation ? DG_ERROR_MEMORY : DG_ERROR_BACKEND, "cuda: %s: %s",
                g->failed, cudaGetErrorString(g->failure));
}

/* ---- Memory ---- */

void cuda_reserve(const ops *o, void **out, size_t bytes) {
    const launch t(o, "reserve");
    *out = nullptr;
    if (t.g->forked()) return;
    const cudaError_t status = cudaMalloc(out, bytes);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* no memory is the caller's to report */
        *out = nullptr;
    } else {
        gpu_check(t.g, status, t.op);
    }
}

void cuda_release(const ops *o, void *memory, size_t) {
    const launch t(o, "release");
    if (!t.g->forked()) gpu_check(t.g, cudaFree(memory), t.op);
}

void cuda_available(const ops *o, int64_t *bytes) {
    const launch t(o, "available");
    size_t left = 0, all = 0;
    if (!t.g->forked()) gpu_check(t.g, cudaMemGetInfo(&left, &all), t.op);
    *bytes = static_cast<int64_t>(left);
}

void cuda_upload(const ops *o, void *to, const void *from, size_t bytes) {
    const launch t(o, "upload");
    if (t.g->failure == cudaSuccess)
        gpu_check(t.g, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, t.g->stream), t.op);
}

void cuda_download(const ops *o, void *to, const void *from, size_t bytes) {
    const launch t(o, "download");
    const bool staged = bytes <= STAGING;
    if (t.g->failure != cudaSuccess) return;
    if (bytes)
        gpu_check(t.g, cudaMemcpyAsync(staged ? t.g->staging : to, from, bytes, cudaMemcpyDeviceToHost, t.g->stream),
                  t.op);
    if (gpu_check(t.g, cudaStreamSynchronize(t.g->stream), t.op) && staged && bytes) memcpy(to, t.g->staging, bytes);
}

void cuda_copy(const ops *o, void *to, const void *from, size_t bytes) {
    const launch t(o, "copy");
    if (t.g->failure == cudaSuccess)
        gpu_check(t.g, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, t.g->stream), t.op);
}

/* ---- Recordings: one graph each ---- */

void cuda_graph_begin(const ops *o, recording *r, bool *replayed) {
    gpu *g = gpu_of(o);
    g->lock();
    *replayed = r->graph != nullptr && !ops_layered(o) && !watched(g);
    if (*replayed) {
        if (g->failure == cudaSuccess)
            gpu_check(g, cudaGraphLaunch(static_cast<cudaGraphExec_t>(r->graph), g->stream), "graph_begin");
        g->unlock();
        return;
    }
    /* the mutex is held until graph_end */
    g->recording = g->failure == cudaSuccess && !r->graph && !ops_layered(o) && !watched(g) &&
                   gpu_check(g, cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal), "graph_begin");
}

void cuda_graph_end(const ops *o, recording *r) {
    gpu *g = gpu_of(o);
    if (g->recording) {
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t ready = nullptr;
        g->recording = false;
        if (gpu_check(g, cudaStreamEndCapture(g->stream, &graph), "graph_begin") &&
            gpu_check(g, cudaGraphInstantiate(&ready, graph, 0), "graph_begin"))
            gpu_check(g, cudaGraphLaunch(ready, g->stream), "graph_begin");
        if (graph) cudaGraphDestroy(graph);
        r->graph = ready;
    }
    g->unlock();
}

void cuda_graph_free(const ops *o, recording *r) {
    const launch t(o, "graph_free");
    if (r->graph && !t.g->forked()) gpu_check(t.g, cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(r->graph)), t.op);
    r->graph = nullptr;
}

/* ---- Weights ---- */

struct placed_weight {
    void *memory;
    placed_weight *next;
};

void cuda_place(const ops *o, tensor *w) {
    const launch t(o, "place");
    const size_t bytes = static_cast<size_t>(w->expert_bytes * w->experts);
    if (t.g->failure != cudaSuccess) return;
    placed_weight *own = new (std::nothrow) placed_weight{nullptr, t.g->weights};
    if (!own) {
        gpu_check(t.g, cudaErrorMemoryAllocation, t.op);
        return;
    }
    t.g->weights = own;
    if (!gpu_check(t.g, cudaMalloc(&own->memory, bytes + WEIGHT_MARGIN), t.op)) return;
    w->placed = static_cast<const uint8_t *>(own->memory);
    gpu_check(t.g, cudaMemcpyAsync(own->memory, w->data, bytes, cudaMemcpyHostToDevice, t.g->stream), t.op);
    gpu_check(t.g, cudaMemsetAsync(static_cast<uint8_t *>(own->memory) + bytes, 0, WEIGHT_MARGIN, t.g->stream), t.op);
}

/* ---- Opening ---- */

/* Why there is no device, in words. */
static int no_device(cudaError_t status, dg_error *error) {
    int driver = 0;
    cudaGetLastError();
    if (status == cudaErrorInsufficientDriver || status == cudaErrorStubLibrary ||
        cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return fail(error, DG_ERROR_BACKEND,
                    "cuda: no NVIDIA driver that this build can use was found on this machine (%s)",
                    cudaGetErrorString(status));
    return fail(error, DG_ERROR_BACKEND, "cuda: this machine has no GPU that it shows to programs (%s)",
                cudaGetErrorString(status));
}

bool cuda_usable() {
    /* without the lock that a static value of its own would be made under: see os_forks */
    static std::atomic<int> known{-1};
    if (known < 0) {
        int count = 0;
        known = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
        cudaGetLastError();
    }
    return known > 0;
}

int cuda_open(ops *o, bool exact, dg_error *error) {
    int count = 0, major = 0, minor = 0, processors = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        return no_device(status == cudaSuccess ? cudaErrorNoDevice : status, error);
    cudaDeviceProp properties;
    if ((status = cudaSetDevice(0)) != cudaSuccess ||
        (status = cudaGetDeviceProperties(&properties, 0)) != cudaSuccess ||
        (status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0)) != cudaSuccess ||
        (status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0)) != cudaSuccess ||
        (status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0)) != cudaSuccess)
        return fail(error, DG_ERROR_BACKEND, "cuda: %s", cudaGetErrorString(status));
    if (10 * major + minor < LEAST_ARCHITECTURE)
        return fail(error, DG_ERROR_BACKEND, "cuda: %s has compute capability %d.%d; this needs 7.5 or later",
                    properties.name, major, minor);
    gpu *g = new (std::nothrow) gpu();
    if (!g) return fail(error, DG_ERROR_SYSTEM, "no memory");
    g->architecture = 10 * major + minor;
    g->processors = processors;
    g->exact = exact;
    g->forks = os_forks();
    o->device = g;
    if ((status = cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking)) != cudaSuccess ||
        (status = cudaHostAlloc(&g->staging, STAGING, 0)) != cudaSuccess ||
        (status = cudaMalloc(reinterpret_cast<void **>(&g->longest), sizeof *g->longest)) != cudaSuccess) {
        cuda_close(o);
        return fail(error, DG_ERROR_BACKEND, "cuda: %s: %s", properties.name, cudaGetErrorString(status));
    }
#define DG_OP(name, arguments, names) o->name = cuda_##name;
#include "ops.def"
#undef DG_OP
    o->key_bytes = exact ? sizeof(float) : sizeof(__half);
    snprintf(o->name, sizeof o->name, "cuda (%.40s)", properties.name);
    return DG_OK;
}

void cuda_close(ops *o) {
    gpu *g = gpu_of(o);
    if (!g) return;
    o->device = nullptr;
    if (g->forked()) return; /* all of it is the parent's */
    close_offload(g);
    while (g->weights) {
        placed_weight *w = g->weights;
        g->weights = w->next;
        cudaFree(w->memory);
        delete w;
    }
    cudaFree(g->longest);
    if (g->staging) cudaFreeHost(g->staging);
    if (g->stream) cudaStreamDestroy(g->stream);
    delete g;
}
