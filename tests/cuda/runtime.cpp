/* The part of the CUDA runtime that the backend uses, without a device: what is put into streams waits until something
 * asks for it, then runs in any order that streams, events and graphs allow. Linked instead of libcudart.
 *
 * Environment: DG_SHIM_SEED, DG_SHIM_ARCH (80), DG_SHIM_MEMORY (bytes, 2 GiB), DG_SHIM_DEVICES (1).
 */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <sys/mman.h>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <signal.h>
#include <unistd.h>
#include <vector>

constexpr int WARP = 32;
#include "machine.h"
#include "shim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

using shim::found;

/* ---- Work ---- */

struct op {
    std::function<void()> work;
    std::vector<std::shared_ptr<op>> after;
    bool done = false;
    std::chrono::steady_clock::time_point finished = {};
};
using op_ref = std::shared_ptr<op>;

struct CUgraph_st {
    struct node {
        std::function<void()> work;
        std::vector<size_t> after;
    };
    std::vector<node> nodes;
    CUstream_st *origin = nullptr;
};
struct CUgraphExec_st {
    std::vector<CUgraph_st::node> nodes;
};
struct CUstream_st {
    std::vector<op_ref> tail;         /* what the next work of this stream comes after */
    CUgraph_st *recording = nullptr;
    std::vector<size_t> recorded_tail;
};
struct CUevent_st {
    std::vector<op_ref> tail;
    bool recorded = false;
    std::chrono::steady_clock::time_point at = {}; /* the host recorded it */
    CUgraph_st *recording = nullptr;
    std::vector<size_t> recorded_tail;
};

static std::vector<op_ref> pending;
static std::vector<CUstream_st *> streams;
static cudaError_t last_error;
static int recordings;

static cudaError_t result(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

static bool ready(const op_ref &o) {
    for (const op_ref &a : o->after)
        if (!a->done) return false;
    return true;
}

/* Runs pending work, whatever may come next, until all of `wanted` is done. */
static void drain(const std::vector<op_ref> &wanted) {
    const auto left = [&] {
        return std::any_of(wanted.begin(), wanted.end(), [](const op_ref &o) { return !o->done; });
    };
    while (left()) {
        std::vector<size_t> can;
        for (size_t i = 0; i < pending.size(); i++) {
            if (ready(pending[i])) can.push_back(i);
            if (can.size() == 16) break;
        }
        if (can.empty()) found("the runtime waits for work that nothing was given to");
        const size_t i = can[shim::random_number() % can.size()];
        const op_ref next = pending[i];
        pending.erase(pending.begin() + static_cast<ptrdiff_t>(i));
        next->work();
        next->after.clear();
        next->done = true;
        next->finished = std::chrono::steady_clock::now();
    }
}

static std::vector<op_ref> everything() { return pending; }

static void add(CUstream_st *s, std::function<void()> work) {
    if (s->recording) {
        s->recording->nodes.push_back({std::move(work), s->recorded_tail});
        s->recorded_tail = {s->recording->nodes.size() - 1};
        return;
    }
    auto o = std::make_shared<op>();
    o->work = std::move(work);
    o->after = s->tail;
    s->tail = {o};
    pending.push_back(o);
}

static bool in_host_function;
static void check_stream(CUstream_st *s, const char *what) {
    if (in_host_function) found("%s from a function of the host that a stream runs", what);
    if (!s) found("%s in the default stream", what);
    if (std::find(streams.begin(), streams.end(), s) == streams.end())
        found("%s in a stream that does not exist", what);
}

static void not_while_recording(const char *what) {
    if (recordings) found("%s while a graph is recorded", what);
}

/* ---- Beginning ---- */

static size_t memory_size = size_t(2) << 30, memory_used;
static int devices = 1;

static void on_fault(int, siginfo_t *info, void *) {
    if (shim::in_device(info->si_addr) && !shim::self) found("host code touches device memory");
    if (shim::self) found("a bad address, or more stack than a thread has");
    signal(SIGSEGV, SIG_DFL);
}

static void begin() {
    static bool begun;
    if (begun) return;
    begun = true;
    if (const char *v = getenv("DG_SHIM_SEED")) shim::seed(strtoull(v, nullptr, 10));
    if (const char *v = getenv("DG_SHIM_ARCH")) shim::architecture = atoi(v);
    if (const char *v = getenv("DG_SHIM_MEMORY")) memory_size = strtoull(v, nullptr, 10);
    if (const char *v = getenv("DG_SHIM_DEVICES")) devices = atoi(v);
    static unsigned char room[64 << 10];
    stack_t alternative = {};
    alternative.ss_sp = room;
    alternative.ss_size = sizeof room;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
}

/* ---- Memory ---- */

static std::map<unsigned char *, size_t> device_pieces;
static std::map<unsigned char *, size_t> locked_pieces; /* page-locked host memory */
static size_t device_top;
static std::multimap<size_t, unsigned char *> device_free;

static bool within(const std::map<unsigned char *, size_t> &pieces, const void *p, size_t bytes) {
    auto *at = static_cast<unsigned char *>(const_cast<void *>(p));
    auto i = pieces.upper_bound(at);
    if (i == pieces.begin()) return false;
    --i;
    return at + bytes <= i->first + i->second;
}

extern "C" {

cudaError_t cudaMalloc(void **out, size_t bytes) {
    begin();
    not_while_recording("cudaMalloc");
    if (devices == 0) return result(cudaErrorNoDevice);
    if (bytes == 0 || memory_used + bytes > memory_size) {
        *out = nullptr;
        return result(cudaErrorMemoryAllocation);
    }
    const size_t whole = (bytes + shim::GAP - 1) / shim::GAP * shim::GAP + shim::GAP;
    unsigned char *at;
    auto reuse = device_free.find(whole);
    if (reuse != device_free.end()) {
        at = reuse->second;
        device_free.erase(reuse);
    } else {
        if (!shim::device_memory) shim::forbid(nullptr, 0);
        at = shim::device_memory + device_top;
        device_top += whole;
        if (device_top > shim::DEVICE_BYTES) found("the emulation is out of device memory");
        shim::forbid(at, whole);
    }
    shim::allow(at, bytes);
    shim::device_open(true);
    memset(at, 0xFF, bytes);
    shim::device_open(false);
    device_pieces[at] = bytes;
    memory_used += bytes;
    *out = at;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    not_while_recording("cudaFree");
    drain(everything());
    auto *at = static_cast<unsigned char *>(p);
    auto i = device_pieces.find(at);
    if (i == device_pieces.end()) found("cudaFree of what cudaMalloc did not give");
    memory_used -= i->second;
    shim::forbid(at, i->second);
    const uintptr_t page = 4096, from = (reinterpret_cast<uintptr_t>(at) + page - 1) / page * page,
                    to = (reinterpret_cast<uintptr_t>(at) + i->second) / page * page;
    if (to > from)
        madvise(reinterpret_cast<void *>(from), to - from,
                MADV_DONTNEED); /* what is there makes every opening slower */
    device_free.insert({(i->second + shim::GAP - 1) / shim::GAP * shim::GAP + shim::GAP, at});
    device_pieces.erase(i);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned int) {
    begin();
    not_while_recording("cudaHostAlloc");
    *out = malloc(bytes);
    if (!*out) return result(cudaErrorMemoryAllocation);
    memset(*out, 0xFF, bytes);
    locked_pieces[static_cast<unsigned char *>(*out)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **out, size_t bytes) { return cudaHostAlloc(out, bytes, 0); }

cudaError_t cudaFreeHost(void *p) {
    if (!p) return cudaSuccess;
    drain(everything());
    if (!locked_pieces.erase(static_cast<unsigned char *>(p))) found("cudaFreeHost of what cudaHostAlloc did not give");
    free(p);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned int) {
    begin();
    if (within(locked_pieces, p, 1)) return result(cudaErrorHostMemoryAlreadyRegistered);
    locked_pieces[static_cast<unsigned char *>(p)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *p) {
    drain(everything());
    return locked_pieces.erase(static_cast<unsigned char *>(p)) ? cudaSuccess
                                                                : result(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    begin();
    *free_bytes = memory_size - memory_used;
    *total = memory_size;
    return cudaSuccess;
}

static void check_side(const void *p, size_t bytes, bool device, const char *side) {
    if (shim::in_device(p) != device)
        found("a copy whose %s is %s memory, against its direction", side, device ? "host" : "device");
    if (device && !within(device_pieces, p, bytes))
        found("a copy of %zu bytes whose %s leaves its allocation", bytes, side);
}

static void check_copy(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (kind != cudaMemcpyHostToDevice && kind != cudaMemcpyDeviceToHost && kind != cudaMemcpyDeviceToDevice)
        found("a copy of kind %d", int(kind));
    check_side(to, bytes, kind != cudaMemcpyDeviceToHost, "destination");
    check_side(from, bytes, kind != cudaMemcpyHostToDevice, "source");
}

static void copy_now(void *to, const void *from, size_t bytes) {
    shim::device_open(true);
    memmove(to, from, bytes);
    shim::device_open(false);
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    check_stream(s, "waiting");
    if (s->recording) found("waiting for a stream that records");
    drain(s->tail);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
    check_stream(s, "a copy");
    if (bytes == 0) return cudaSuccess;
    check_copy(to, from, bytes, kind);
    const bool to_pageable = kind == cudaMemcpyDeviceToHost && !within(locked_pieces, to, bytes);
    const bool from_pageable = kind == cudaMemcpyHostToDevice && !within(locked_pieces, from, bytes);
    if (s->recording && (to_pageable || from_pageable)) found("a graph copies memory that is not page-locked");
    if (from_pageable) { /* the runtime takes such memory before it returns */
        const auto *b = static_cast<const unsigned char *>(from);
        auto staged = std::make_shared<std::vector<unsigned char>>(b, b + bytes);
        add(s, [=] { copy_now(to, staged->data(), bytes); });
    } else {
        add(s, [=] { copy_now(to, from, bytes); });
    }
    return to_pageable ? cudaStreamSynchronize(s) : cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t s) {
    for (size_t y = 0; y < height; y++) {
        const cudaError_t status = cudaMemcpyAsync(static_cast<char *>(to) + y * to_pitch,
                                                   static_cast<const char *>(from) + y * from_pitch, width, kind, s);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) {
    check_stream(s, "a fill");
    if (bytes == 0) return cudaSuccess;
    check_side(p, bytes, true, "destination");
    add(s, [=] {
        shim::device_open(true);
        memset(p, value, bytes);
        shim::device_open(false);
    });
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t work, void *arg) {
    check_stream(s, "a function of the host");
    add(s, [=] {
        in_host_function = true;
        work(arg);
        in_host_function = false;
    });
    return cudaSuccess;
}

/* ---- Streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned int flags) {
    begin();
    if (devices == 0) return result(cudaErrorNoDevice);
    if (flags != cudaStreamNonBlocking) found("a stream that waits for the default one");
    streams.push_back(*out = new CUstream_st);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned int flags, int) {
    return cudaStreamCreateWithFlags(out, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    check_stream(s, "destroying");
    drain(s->tail);
    streams.erase(std::find(streams.begin(), streams.end(), s));
    delete s;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    not_while_recording("cudaDeviceSynchronize");
    drain(everything());
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned int) {
    begin();
    *out = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    check_stream(s, "recording an event");
    e->recorded = true;
    e->at = std::chrono::steady_clock::now();
    e->recording = s->recording;
    e->recorded_tail = s->recorded_tail;
    e->tail = s->tail;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned int) {
    check_stream(s, "waiting for an event");
    if (e->recording) {
        if (s->recording && s->recording != e->recording) found("a graph waits for an event of another one");
        if (!s->recording) s->recorded_tail.clear();
        s->recording = e->recording;
        s->recorded_tail.insert(s->recorded_tail.end(), e->recorded_tail.begin(), e->recorded_tail.end());
    } else if (e->recorded) {
        if (s->recording) found("a graph waits for an event from outside");
        s->tail.insert(s->tail.end(), e->tail.begin(), e->tail.end());
    }
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (e->recording) found("waiting for an event that a graph records");
    drain(e->tail);
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
    return std::all_of(e->tail.begin(), e->tail.end(), [](const op_ref &o) { return o->done; }) ? cudaSuccess
                                                                                                : cudaErrorNotReady;
}
/* Of the host's time: it says nothing of a device, but what is computed from it is not all zero. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    const auto when = [](cudaEvent_t e) {
        auto last = e->at;
        for (const op_ref &o : e->tail) {
            if (!o->done) found("the time of an event that has not happened");
            last = std::max(last, o->finished);
        }
        return last;
    };
    if (!from->recorded || !to->recorded) found("the time of an event that was not recorded");
    *ms = std::max(0.0f, std::chrono::duration<float, std::milli>(when(to) - when(from)).count());
    return cudaSuccess;
}

/* ---- Graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    check_stream(s, "recording a graph");
    if (s->recording) return result(cudaErrorIllegalState);
    s->recording = new CUgraph_st;
    s->recording->origin = s;
    s->recorded_tail.clear();
    recordings++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out) {
    check_stream(s, "ending a graph");
    CUgraph_st *g = s->recording;
    *out = nullptr;
    if (!g || g->origin != s) return result(cudaErrorIllegalState);
    recordings--;
    /* everything must lead to what the origin stream did last */
    std::vector<bool> reached(g->nodes.size());
    std::vector<size_t> open = s->recorded_tail;
    while (!open.empty()) {
        const size_t i = open.back();
        open.pop_back();
        if (reached[i]) continue;
        reached[i] = true;
        open.insert(open.end(), g->nodes[i].after.begin(), g->nodes[i].after.end());
    }
    if (std::find(reached.begin(), reached.end(), false) != reached.end())
        found("a graph whose streams are not joined again");
    for (CUstream_st *other : streams)
        if (other->recording == g) {
            other->recording = nullptr;
            other->recorded_tail.clear();
        }
    *out = g;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long) {
    *out = new CUgraphExec_st{g->nodes};
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
    drain(everything());
    delete e;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
    check_stream(s, "starting a graph");
    if (s->recording) found("a graph inside a graph");
    std::vector<op_ref> ops;
    std::vector<bool> leads(e->nodes.size());
    for (const auto &n : e->nodes) {
        auto o = std::make_shared<op>();
        o->work = n.work;
        for (size_t a : n.after) {
            o->after.push_back(ops[a]);
            leads[a] = true;
        }
        if (n.after.empty()) o->after = s->tail;
        ops.push_back(o);
        pending.push_back(o);
    }
    if (ops.empty()) return cudaSuccess;
    s->tail.clear();
    for (size_t i = 0; i < ops.size(); i++)
        if (!leads[i]) s->tail.push_back(ops[i]);
    return cudaSuccess;
}

/* ---- The device ---- */

cudaError_t cudaGetDeviceCount(int *n) {
    begin();
    *n = devices;
    return devices ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int i) {
    begin();
    return i >= 0 && i < devices ? cudaSuccess : result(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int *i) {
    *i = 0;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) {
    begin();
    *v = devices ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {};
    snprintf(p->name, sizeof p->name, "emulated sm_%d", shim::architecture);
    p->major = shim::architecture / 10;
    p->minor = shim::architecture % 10;
    p->multiProcessorCount = 4;
    p->totalGlobalMem = memory_size;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr which, int) {
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *v = shim::architecture / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *v = shim::architecture % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *v = 4; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *v = shim::architecture >= 80 ? 99 << 10 : 64 << 10;
        return cudaSuccess;
    case cudaDevAttrClockRate:
        *v = 10'000'000;
        return cudaSuccess; /* rates as of a small card: 300 GB/s, 5e13 operations */
    case cudaDevAttrMemoryClockRate: *v = 7'812'500; return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth: *v = 256; return cudaSuccess;
    default: found("attribute %d is not emulated", int(which));
    }
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int) {
    snprintf(id, static_cast<size_t>(length), "FFFF:FF:1F.7"); /* a slot that no machine has */
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() {
    const cudaError_t status = last_error;
    last_error = cudaSuccess;
    return status;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess                 ? "cudaSuccess"
           : e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
           : e == cudaErrorNoDevice         ? "cudaErrorNoDevice"
                                            : "an error";
}
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorNoDevice         ? "no CUDA-capable device is detected"
                                            : "an error";
}

} // extern "C"

cudaError_t shim::enqueue(const run &r, cudaStream_t s) {
    check_stream(s, "a kernel");
    add(s, [r] { run_kernel(r); });
    return cudaSuccess;
}

void shim::lose() {
    for (const op_ref &o : pending) o->done = true;
    pending.clear();
    for (CUstream_st *s : streams) {
        if (s->recording && s->recording->origin == s) delete s->recording;
        s->recording = nullptr;
        s->recorded_tail.clear();
    }
    recordings = 0;
}
