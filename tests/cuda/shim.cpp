/* Fibers, barriers, what warps do together, and shared memory. */
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

constexpr int WARP = 32;
#include "machine.h"
#include "shim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(x) x
#else
#define ASAN(x)
#endif

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

namespace shim {

int architecture = 80;
thread *self;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char *device_memory, *shared_memory;
uint32_t now = 1;
bool races_watched;
uint8_t *watched_valid[2];

__attribute__((weak)) void touched(const void *, size_t, bool, bool, const void *) {} /* without the race checker */

/* ---- Chance ---- */

static uint64_t state, seed_value;

void seed(uint64_t value) { state = seed_value = value; }

uint32_t random_number() { /* splitmix64 */
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32);
}

static void shuffle_order(std::vector<uint32_t> &order) {
    if (!seed_value) return;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
}

/* ---- Memory ---- */

static unsigned char *reserve(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<unsigned char *>(p);
}

static void prepare_memory() {
    if (device_memory) return;
    device_memory = reserve(DEVICE_BYTES);
    shared_memory = reserve(SHARED_BYTES);
    if (races_watched) {
        watched_valid[0] = reserve(DEVICE_BYTES);
        watched_valid[1] = reserve(SHARED_BYTES);
    }
    ASAN(__asan_poison_memory_region(shared_memory, SHARED_BYTES);)
    device_open(false);
}

static void mark(void *p, size_t bytes, uint8_t valid) {
    if (!races_watched) return;
    if (in_device(p)) memset(watched_valid[0] + (static_cast<unsigned char *>(p) - device_memory), valid, bytes);
    else memset(watched_valid[1] + (static_cast<unsigned char *>(p) - shared_memory), valid, bytes);
}

void allow(void *p, size_t bytes) {
    prepare_memory();
    mark(p, bytes, 1);
    ASAN(__asan_unpoison_memory_region(p, bytes);)
}

void forbid(void *p, size_t bytes) {
    prepare_memory();
    mark(p, bytes, 0);
    ASAN(__asan_poison_memory_region(p, bytes);)
}

void device_open(bool open) {
    if (mprotect(device_memory, DEVICE_BYTES, open ? PROT_READ | PROT_WRITE : PROT_NONE)) abort();
}

/* ---- Fibers ---- */

enum : size_t {
#if defined(__SANITIZE_ADDRESS__)
    STACK = 256 << 10,
#else
    STACK = 64 << 10,
#endif
    PAGE = 4096,
    MOST_THREADS = 1024
};

extern "C" void shim_switch(void **from, void *to);
asm(R"(
.text
.globl shim_switch
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

struct pending_copy {
    void *to;
    unsigned char bytes[16];
    int n;
};

enum class waiting { nothing, barrier, warp, over };

struct fiber : thread {
    void *stack_pointer = nullptr;
    unsigned char *stack = nullptr;
    void *fake_stack = nullptr;
    uint32_t number = 0; /* in the block */
    waiting state = waiting::over;
    std::vector<pending_copy> open;                /* copies since the last commit */
    std::vector<std::vector<pending_copy>> groups; /* committed, not waited for */
    fiber() : thread() {}
};

struct warp {
    unsigned char in[WARP][64], out[WARP][64];
    uint32_t arrived = 0, alive = 0;
    const char *what = nullptr;
    site at = {nullptr, 0};
    uint32_t synced = 0;
};

static std::vector<fiber> fibers;
static std::vector<warp> warps;
static void *scheduler;
#if defined(__SANITIZE_ADDRESS__)
static void *scheduler_fake;
static const void *scheduler_bottom;
static size_t scheduler_size;
#endif
static uint32_t n_threads, alive, arrived, block_synced, launch_began;
static uint64_t block_number;
static site barrier_at;
static const std::function<void()> *body;
static fiber *running() { return static_cast<fiber *>(self); }
static warp &warp_of(const fiber *f) { return warps[f->number / WARP]; }

void found(const char *format, ...) {
    char line[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (self)
        fprintf(stderr, "device: %s [block (%u, %u, %u) of (%u, %u, %u), thread (%u, %u, %u), seed %llu]\n", line,
                block_index.x, block_index.y, block_index.z, grid_size.x, grid_size.y, grid_size.z, self->index.x,
                self->index.y, self->index.z, static_cast<unsigned long long>(seed_value));
    else fprintf(stderr, "device: %s [seed %llu]\n", line, static_cast<unsigned long long>(seed_value));
    fflush(stderr);
    _exit(FOUND);
}

static void to_scheduler() {
    fiber *f = running();
    ASAN(__sanitizer_start_switch_fiber(f->state == waiting::over ? nullptr : &f->fake_stack, scheduler_bottom,
                                        scheduler_size);)
    shim_switch(&f->stack_pointer, scheduler);
    ASAN(__sanitizer_finish_switch_fiber(f->fake_stack, &scheduler_bottom, &scheduler_size);)
}

static void to_fiber(fiber *f) {
    self = f;
    ASAN(__sanitizer_start_switch_fiber(&scheduler_fake, f->stack, STACK);)
    shim_switch(&scheduler, f->stack_pointer);
    ASAN(__sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);)
    self = nullptr;
}

static void open_barrier() {
    arrived = 0;
    block_synced = ++now;
    for (uint32_t i = 0; i < n_threads; i++)
        if (fibers[i].state == waiting::barrier) fibers[i].state = waiting::nothing;
}

static void leave() {
    fiber *f = running();
    warp &w = warp_of(f);
    if (!f->open.empty() || !f->groups.empty())
        found("a thread ends with asynchronous copies that it never waited for");
    if (w.arrived)
        found("lane %u ends while others of its warp wait in %s at %s:%d", f->number % WARP, w.what, w.at.file,
              w.at.line);
    w.alive--;
    f->state = waiting::over;
    if (--alive && arrived == alive) open_barrier();
}

static void fiber_main() {
    ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);) (*body)();
    leave();
    to_scheduler();
    abort();
}

static void start(fiber *f) {
    if (!f->stack) {
        f->stack = reserve(PAGE + STACK) + PAGE;
        if (mprotect(f->stack - PAGE, PAGE, PROT_NONE)) abort();
    }
    ASAN(__asan_unpoison_memory_region(f->stack, STACK);) /* the last run was left in the middle of its frames */
    void **top = reinterpret_cast<void **>(f->stack + STACK);
    *--top = nullptr; /* a return address for unwinders; keeps the stack aligned as after a call */
    *--top = reinterpret_cast<void *>(fiber_main);
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
    f->stack_pointer = top;
    f->fake_stack = nullptr;
    f->state = waiting::nothing;
}

void block_barrier(site at) {
    if (!self) found("block_sync() outside a kernel");
    fiber *f = running();
    if (warp_of(f).arrived)
        found("block_sync() at %s:%d while lanes of the warp wait in %s at %s:%d", at.file, at.line, warp_of(f).what,
              warp_of(f).at.file, warp_of(f).at.line);
    if (arrived == 0) barrier_at = at;
    else if (barrier_at.line != at.line || strcmp(barrier_at.file, at.file))
        found("threads of a block wait at %s:%d and at %s:%d", barrier_at.file, barrier_at.line, at.file, at.line);
    if (++arrived == alive) {
        open_barrier();
        if (!seed_value) return;
        f->state = waiting::nothing; /* let others go first */
    } else {
        f->state = waiting::barrier;
    }
    to_scheduler();
}

void warp_together(const char *what, const void *in, size_t bytes_in, void *out, size_t bytes_out, lanes_work work,
                   site at) {
    if (!self) found("%s outside a kernel", what);
    fiber *f = running();
    warp &w = warp_of(f);
    const uint32_t lane = f->number % WARP;
    if (w.alive != WARP) found("%s at %s:%d with %u lanes: some have ended", what, at.file, at.line, w.alive);
    if (w.arrived && (strcmp(w.what, what) || w.at.line != at.line || strcmp(w.at.file, at.file)))
        found("lanes of a warp part: %s at %s:%d and %s at %s:%d", w.what, w.at.file, w.at.line, what, at.file,
              at.line);
    w.what = what;
    w.at = at;
    if (bytes_in) memcpy(w.in[lane], in, bytes_in);
    if (++w.arrived == WARP) {
        w.arrived = 0;
        if (work) work(w.in, w.out);
        else w.synced = ++now;
        for (uint32_t i = f->number - lane; i < f->number - lane + WARP; i++)
            if (fibers[i].state == waiting::warp) fibers[i].state = waiting::nothing;
    } else {
        f->state = waiting::warp;
        to_scheduler();
    }
    if (bytes_out) memcpy(out, w.out[lane], bytes_out);
}

void warp_barrier(site at) { warp_together("warp_sync", nullptr, 0, nullptr, 0, nullptr, at); }

static void report_deadlock() {
    for (uint32_t i = 0; i < n_threads; i++)
        if (fibers[i].state == waiting::warp) {
            const warp &w = warp_of(&fibers[i]);
            self = &fibers[i];
            found("waits in %s at %s:%d for lanes that wait elsewhere%s", w.what, w.at.file, w.at.line,
                  arrived ? ", some at a block_sync()" : "");
        }
    found("threads wait for each other");
}

/* ---- Shared memory ---- */

struct shared_piece {
    unsigned char *at;
    size_t bytes;
};
static std::vector<shared_piece> pieces; /* of all kernels that ran */
static size_t shared_used = (size_t(256) << 10) + GAP; /* the front is for dynamic memory */
static size_t dynamic_bytes;

void *shared_static(size_t bytes) {
    prepare_memory();
    unsigned char *at = shared_memory + shared_used;
    shared_used += (bytes + GAP + 127) / 128 * 128;
    if (shared_used > SHARED_BYTES) found("the emulation is out of shared memory");
    thread *const kernel = self;
    self = nullptr; /* the filling is not the kernel's */
    allow(at, bytes);
    memset(at, 0xFF, bytes);
    pieces.push_back({at, bytes});
    self = kernel;
    return at;
}

void *shared_dynamic() { return shared_memory; }

uint32_t shared_address(const void *p, size_t bytes) {
    const unsigned char *at = static_cast<const unsigned char *>(p);
    bool ok = in_shared(p) && at + bytes <= shared_memory + dynamic_bytes;
    for (const shared_piece &s : pieces) ok |= at >= s.at && at + bytes <= s.at + s.bytes;
    if (!ok) found("%zu bytes at an address that is not the block's shared memory", bytes);
    return static_cast<uint32_t>(at - shared_memory);
}

/* ---- Running ---- */

void run_kernel(const run &r) {
    prepare_memory();
    n_threads = r.block.x * r.block.y * r.block.z;
    if (n_threads == 0 || n_threads % WARP || n_threads > MOST_THREADS) found("a block of %u threads", n_threads);
    if (fibers.size() < MOST_THREADS) fibers.resize(MOST_THREADS);
    warps.resize(MOST_THREADS / WARP);
    block_size = r.block;
    grid_size = r.grid;
    body = &r.kernel;
    launch_began = ++now;
    device_open(true);
    dynamic_bytes = r.shared;
    allow(shared_memory, dynamic_bytes);
    const uint64_t blocks = uint64_t(r.grid.x) * r.grid.y * r.grid.z;
    if (blocks == 0) found("a grid of no blocks");
    std::vector<uint32_t> block_order(blocks), order(n_threads);
    for (uint32_t i = 0; i < blocks; i++) block_order[i] = i;
    shuffle_order(block_order);
    for (uint32_t b : block_order) {
        block_number = b;
        block_index = {b % r.grid.x, b / r.grid.x % r.grid.y, b / r.grid.x / r.grid.y};
        memset(shared_memory, 0xFF, dynamic_bytes);
        for (const shared_piece &s : pieces) memset(s.at, 0xFF, s.bytes);
        alive = n_threads;
        arrived = 0;
        block_synced = ++now;
        for (uint32_t i = 0; i < n_threads; i++) {
            fiber &f = fibers[i];
            f.number = i;
            f.index = {i % r.block.x, i / r.block.x % r.block.y, i / r.block.x / r.block.y};
            order[i] = i;
            start(&f);
        }
        for (uint32_t i = 0; i < n_threads / WARP; i++) {
            warps[i].arrived = 0;
            warps[i].alive = WARP;
            warps[i].synced = 0;
        }
        while (alive) {
            bool moved = false;
            shuffle_order(order);
            for (uint32_t i : order)
                while (fibers[i].state == waiting::nothing) {
                    moved = true;
                    to_fiber(&fibers[i]);
                    if (seed_value) break;
                }
            if (!moved && alive) report_deadlock();
        }
    }
    forbid(shared_memory, dynamic_bytes);
    dynamic_bytes = 0;
    device_open(false);
    ++now;
}

cudaError_t launch(std::function<void()> kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const size_t most = architecture >= 80 ? 99 << 10 : 64 << 10; /* what every card of these targets has */
    if (shared > most || uint64_t(grid.x) * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidValue;
    return enqueue({std::move(kernel), grid, block, shared}, stream);
}

uint32_t thread_number() { return static_cast<uint32_t>(block_number * n_threads + running()->number + 1); }
uint32_t threads_of_block() { return n_threads; }
clocks thread_clocks() { return {launch_began, block_synced, warp_of(running()).synced}; }

void need(int least_architecture, const char *what) {
    if (architecture < least_architecture)
        found("%s needs sm_%d; this is sm_%d", what, least_architecture, architecture);
}

/* ---- Asynchronous copies ---- */

static void in_flight(const pending_copy &c, bool flies) {
    if (races_watched)
        memset(watched_valid[1] + (static_cast<unsigned char *>(c.to) - shared_memory), flies ? 2 : 1,
               static_cast<size_t>(c.n));
}

static void land(std::vector<pending_copy> &copies) {
    for (const pending_copy &c : copies) {
        in_flight(c, false);
        if (races_watched) touched(c.to, static_cast<size_t>(c.n), true, false, nullptr);
        memcpy(c.to, c.bytes, static_cast<size_t>(c.n));
    }
    copies.clear();
}

void copy(void *to, const void *from, int bytes, bool valid) {
    if (!self) found("a copy outside a kernel");
    pending_copy c = {to, {0}, bytes};
    const size_t n = static_cast<size_t>(bytes);
    if (reinterpret_cast<uintptr_t>(to) % n || (valid && reinterpret_cast<uintptr_t>(from) % n))
        found("an asynchronous copy of %d bytes that is not aligned", bytes);
    shared_address(to, n);
    if (valid) {
        if (!in_device(from)) found("an asynchronous copy from what is not device memory");
        if (races_watched) touched(from, n, false, false, __builtin_return_address(0));
        ASAN(if (__asan_region_is_poisoned(const_cast<void *>(from), n))
                 found("an asynchronous copy from outside an allocation");)
        memcpy(c.bytes, from, n);
    }
    if (races_watched) touched(to, n, true, false, __builtin_return_address(0));
    if (architecture < 80 ||
        (seed_value && random_number() % 2)) { /* at once, which it may be; but nobody may count on it */
        memcpy(to, c.bytes, n);
        if (architecture < 80) return;
    }
    in_flight(c, true);
    running()->open.push_back(c);
}

void copy_commit() {
    if (architecture < 80) return;
    fiber *f = running();
    f->groups.push_back(std::move(f->open));
    f->open.clear();
}

void copy_wait(int left) {
    fiber *f = running();
    while (f->groups.size() > static_cast<size_t>(left)) {
        land(f->groups.front());
        f->groups.erase(f->groups.begin());
    }
}

} // namespace shim

/* ---- What warps do together ---- */

using namespace shim;

uint32_t lanes_where(bool holds, site at) {
    const unsigned char mine = holds;
    uint32_t all;
    warp_together(
        "ballot", &mine, 1, &all, sizeof all,
        [](const unsigned char (*in)[64], unsigned char (*out)[64]) {
            uint32_t bits = 0;
            for (int l = 0; l < WARP; l++) bits |= uint32_t(in[l][0]) << l;
            for (int l = 0; l < WARP; l++) memcpy(out[l], &bits, sizeof bits);
        },
        at);
    return all;
}

/* Matrix i's row j is named by lane 8 i + j; lane l gets of each matrix the items 2 (l % 4) and the next of row l / 4,
 * or, transposed, of rows 2 (l % 4) and the next the item l / 4. */
template <int MATRICES, bool TRANSPOSED> static void load(uint32_t *r, const void *shared_row, site at) {
    need(75, "ldmatrix");
    const int lane = static_cast<int>(running()->number % WARP);
    if (lane < 8 * MATRICES) {
        if (reinterpret_cast<uintptr_t>(shared_row) % 16)
            found("ldmatrix from a row that is not aligned to 16 bytes (%s:%d)", at.file, at.line);
        shared_address(shared_row, 16);
        if (races_watched) touched(shared_row, 16, false, false, __builtin_return_address(0));
    }
    warp_together(
        "ldmatrix", &shared_row, sizeof shared_row, r, MATRICES * sizeof *r,
        [](const unsigned char (*in)[64], unsigned char (*out)[64]) {
            for (int l = 0; l < WARP; l++)
                for (int m = 0; m < MATRICES; m++) {
                    uint16_t pair[2];
                    for (int i = 0; i < 2; i++) {
                        const int row = TRANSPOSED ? l % 4 * 2 + i : l / 4, item = TRANSPOSED ? l / 4 : l % 4 * 2 + i;
                        const unsigned char *from;
                        memcpy(&from, in[8 * m + row], sizeof from);
                        memcpy(&pair[i], from + 2 * item, 2);
                    }
                    memcpy(out[l] + 4 * m, pair, 4);
                }
        },
        at);
}

void load_matrices(uint32_t (&r)[4], const void *row, site at) { load<4, false>(r, row, at); }
void load_matrices_transposed(uint32_t (&r)[4], const void *row, site at) { load<4, true>(r, row, at); }
void load_matrices(uint32_t (&r)[2], const void *row, site at) { load<2, false>(r, row, at); }

/* Registers of m16n8k(8 N): item e of N per register. a: registers 0 to 3 hold rows l/4 and l/4 + 8 of columns N (l %
 * 4) + e, then the same rows of columns 4 N further on; b: registers 0 and 1 hold those columns of row l / 4; d: rows
 * l/4 (0, 1) and l/4 + 8 (2, 3) of columns 2 (l % 4) + 0, 1. */
template <class ITEM, class SUM, int N> struct fragments {
    SUM d[4];
    ITEM a[4][N], b[2][N];
};
template <class ITEM, class SUM, int N, class VALUE>
static void multiply(const unsigned char (*in)[64], unsigned char (*out)[64], VALUE value) {
    using F = fragments<ITEM, SUM, N>;
    SUM a[16][8 * N], b[8][8 * N], d[16][8];
    for (int l = 0; l < WARP; l++) {
        F f;
        memcpy(&f, in[l], sizeof f);
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < N; e++) a[l / 4 + r % 2 * 8][l % 4 * N + e + r / 2 * 4 * N] = value(f.a[r][e]);
        for (int r = 0; r < 2; r++)
            for (int e = 0; e < N; e++) b[l / 4][l % 4 * N + e + r * 4 * N] = value(f.b[r][e]);
        for (int i = 0; i < 4; i++) d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = f.d[i];
    }
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            SUM sum = SUM(0);
            for (int k = 0; k < 8 * N; k++) sum += a[i][k] * b[j][k];
            d[i][j] += sum;
        }
    for (int l = 0; l < WARP; l++) {
        SUM mine[4];
        for (int i = 0; i < 4; i++) mine[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        memcpy(out[l], mine, sizeof mine);
    }
}

template <class ITEM, class SUM, int N>
static void mma(const char *what, SUM (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], lanes_work work,
                site at) {
    need(80, what);
    fragments<ITEM, SUM, N> f;
    static_assert(sizeof f <= 64, "room of a lane");
    memcpy(f.d, d, sizeof d);
    memcpy(f.a, a, sizeof a);
    memcpy(f.b, b, sizeof b);
    warp_together(what, &f, sizeof f, d, sizeof d, work, at);
}

void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], site at) {
    mma<int8_t, int32_t, 4>(
        "mma_s8", d, a, b,
        [](const unsigned char (*in)[64], unsigned char (*out)[64]) {
            multiply<int8_t, int32_t, 4>(in, out, [](int8_t x) { return int32_t(x); });
        },
        at);
}
/* Columns 16 to 31 of the fragments are registers 2 and 3 of a, 1 of b: nothing there leaves 16 columns. */
void mma_s8_short(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, site at) {
    const uint32_t a[4] = {a0, a1, 0, 0}, both[2] = {b, 0};
    mma_s8(d, a, both, at);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], site at) {
    mma<__half, float, 2>(
        "mma_f16", d, a, b,
        [](const unsigned char (*in)[64], unsigned char (*out)[64]) {
            multiply<__half, float, 2>(in, out, [](__half x) { return __half2float(x); });
        },
        at);
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], site at) {
    mma<__nv_bfloat16, float, 2>(
        "mma_bf16", d, a, b,
        [](const unsigned char (*in)[64], unsigned char (*out)[64]) {
            multiply<__nv_bfloat16, float, 2>(in, out, [](__nv_bfloat16 x) { return __bfloat162float(x); });
        },
        at);
}

/* ---- Atomics ---- */

void shim::atomic_access(void *at, size_t bytes) {
    if (races_watched) touched(at, bytes, true, true, __builtin_return_address(0));
}

int32_t atomic_add(int32_t *at, int32_t v) {
    atomic_access(at, sizeof *at);
    const int32_t old = *at;
    *at = static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(v));
    return old;
}
void atomic_add(int64_t *at, int64_t v) {
    atomic_access(at, sizeof *at);
    *at = static_cast<int64_t>(static_cast<uint64_t>(*at) + static_cast<uint64_t>(v));
}
void atomic_claim(int32_t *at, int32_t v) {
    atomic_access(at, sizeof *at);
    if (*at == 0) *at = v;
}
int32_t atomic_or(int32_t *at, int32_t v) {
    atomic_access(at, sizeof *at);
    const int32_t old = *at;
    *at = old | v;
    return old;
}
int32_t atomic_max(int32_t *at, int32_t v) {
    atomic_access(at, sizeof *at);
    const int32_t old = *at;
    *at = v > old ? v : old;
    return old;
}
