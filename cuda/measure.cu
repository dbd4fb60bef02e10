/* Measures the device's peak rates, of reading its memory and of copying page-locked memory to it; and tells its rated
 * numbers. */
#include "cuda.h"

#include "backend.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

constexpr int THREADS = 256, AT_ONCE = 4;
constexpr size_t MOST_READ = size_t(1) << 30, MOST_COPIED = size_t(256) << 20, LEAST = size_t(1) << 20;
constexpr int RUNS = 8;

/* Reads from[n]; the bits of all together, which the compiler cannot know to be of no use, go nowhere. */
__global__ void DG_HOT(THREADS) read_kernel(uint32_t *out, const uint4 *from, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
    uint32_t bits = 0;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < n; i += AT_ONCE * step) {
        uint4 v[AT_ONCE];
        DG_UNROLL for (int j = 0; j < AT_ONCE; j++)
            v[j] = i + j * step < n ? from[i + j * step] : make_uint4(0, 0, 0, 0);
        DG_UNROLL for (int j = 0; j < AT_ONCE; j++)
            bits |= v[j].x | v[j].y | v[j].z | v[j].w;
    }
    if (bits) *out = bits; /* all is zero */
}

/* What it takes, and gives back. */
struct measuring {
    uint32_t *out = nullptr;
    unsigned char *there = nullptr, *locked = nullptr;
    cudaEvent_t began = nullptr, ended = nullptr;
    ~measuring() {
        cudaFree(out);
        cudaFree(there);
        if (locked) cudaFreeHost(locked);
        for (cudaEvent_t e : {began, ended})
            if (e) cudaEventDestroy(e);
    }
};

/* Bytes per second in the best of some runs of work(), which moves so many; 0 after a failure. */
template <class F> static double best_rate(gpu *g, const measuring &m, size_t bytes, F work) {
    float best = INFINITY;
    for (int i = 0; i < RUNS; i++) {
        float milliseconds = 0.0f;
        bool all = gpu_check(g, cudaEventRecord(m.began, g->stream), "measure");
        if (all) work();
        all = all && gpu_check(g, cudaEventRecord(m.ended, g->stream), "measure") &&
              gpu_check(g, cudaEventSynchronize(m.ended), "measure") &&
              gpu_check(g, cudaEventElapsedTime(&milliseconds, m.began, m.ended), "measure");
        if (!all) return 0.0;
        if (milliseconds > 0.0f && milliseconds < best) best = milliseconds;
    }
    return static_cast<double>(bytes) / (static_cast<double>(best) * 1e-3);
}

bool cuda_measure(const ops *o, dg_device_rates *out) {
    const launch t(o, "measure");
    gpu *g = t.g;
    measuring m;
    size_t left = 0, all = 0;
    const auto check = [&](cudaError_t status) { return gpu_check(g, status, t.op); };
    *out = dg_device_rates{};
    if (g->failure != cudaSuccess || !check(cudaMemGetInfo(&left, &all))) return false;
    const size_t share = left / 16 / LEAST * LEAST, bytes = share < MOST_READ ? share : MOST_READ,
                 copied = bytes < MOST_COPIED ? bytes : MOST_COPIED;
    if (bytes == 0) return false;
    if (!check(cudaMalloc(reinterpret_cast<void **>(&m.out), sizeof *m.out)) ||
        !check(cudaMalloc(reinterpret_cast<void **>(&m.there), bytes)) ||
        !check(cudaHostAlloc(reinterpret_cast<void **>(&m.locked), copied, 0)) || !check(cudaEventCreate(&m.began)) ||
        !check(cudaEventCreate(&m.ended)) || !check(cudaMemsetAsync(m.there, 0, bytes, g->stream)))
        return false;
    memset(m.locked, 0, copied);
    const auto pieces = static_cast<int64_t>(bytes / sizeof(uint4));
    out->memory = best_rate(g, m, bytes, [&] {
        t.start(read_kernel, dim3(static_cast<unsigned>(8 * g->processors)), dim3(THREADS), 0, m.out,
                reinterpret_cast<const uint4 *>(m.there), pieces);
    });
    out->copies = best_rate(
        g, m, copied, [&] { check(cudaMemcpyAsync(m.there, m.locked, copied, cudaMemcpyHostToDevice, g->stream)); });
    return check(cudaStreamSynchronize(g->stream));
}

/* ---- Rated ---- */

/* As for machines.def: what programs reach of a data sheet's rates, and of a link's. */
constexpr double REACHED = 0.6, REACHED_LINK = 0.77;

/* Operations per clock and processor: dense float16 products with float32 sums. */
static int products_per_clock(int32_t architecture) {
    switch (architecture) {
    case 80: return 2048;
    case 90: return 4096;
    case 100:
    case 103: return 8192;
    default: return 512;
    }
}

void cuda_rated(const ops *o, dg_machine *machine) {
    const launch t(o, "rated");
    const auto asked = [&](cudaDeviceAttr which) {
        int value = 0;
        return t.g->failure == cudaSuccess && cudaDeviceGetAttribute(&value, which, 0) == cudaSuccess && value > 0
                   ? static_cast<double>(value)
                   : 0.0;
    };
    const auto set = [](double *rate, double found) {
        if (found > 0.0) *rate = found;
    };
    const double kilo = 1e3; /* clocks are in kHz */
    char folder[64], id[32];
    set(&machine->gpu,
        REACHED * 2 * kilo * asked(cudaDevAttrMemoryClockRate) * asked(cudaDevAttrGlobalMemoryBusWidth) / 8);
    set(&machine->gpu_ops,
        REACHED * kilo * asked(cudaDevAttrClockRate) * t.g->processors * products_per_clock(t.g->architecture));
    const bool linked = t.g->failure == cudaSuccess && cudaDeviceGetPCIBusId(id, sizeof id, 0) == cudaSuccess;
    cudaGetLastError(); /* what it does not tell is no failure */
    if (!linked) return;
    for (char *c = id; *c; c++) *c = static_cast<char>(tolower(*c)); /* as sysfs writes it */
    snprintf(folder, sizeof folder, "/sys/bus/pci/devices/%.31s", id);
    set(&machine->pcie, REACHED_LINK * os_link_rate(folder));
}
