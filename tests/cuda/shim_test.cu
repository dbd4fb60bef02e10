/* The emulation itself: right kernels pass with every seed, wrong ones are found, and wrappers give what PTX documents.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <string>
#include <vector>

#include "device.h"

#include "../c/check.h"

enum { THREADS = 128 };

/* ---- Kernels that are right ---- */

__global__ void reverse_blocks(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    const unsigned first = blockIdx.x * THREADS;
    room[threadIdx.x] = x[first + threadIdx.x];
    block_sync();
    y[first + threadIdx.x] = room[THREADS - 1 - threadIdx.x];
}

/* Sums rows of 4 * THREADS floats through two stages of asynchronous copies. */
__global__ void staged_sum(float *y, const float *x, int stages) {
    DG_DYNAMIC_SHARED(float, room); /* [2][4 * THREADS] */
    DG_SHARED(float, sums, THREADS / WARP);
    float sum = 0.0f;
    copy_async<16>(room + 4 * threadIdx.x, x + 4 * threadIdx.x);
    copy_async_commit();
    for (int s = 0; s < stages; s++) {
        if (s + 1 < stages)
            copy_async<16>(room + (s + 1) % 2 * 4 * THREADS + 4 * threadIdx.x,
                           x + (s + 1) * 4 * THREADS + 4 * threadIdx.x);
        copy_async_commit();
        copy_async_wait<1>();
        block_sync();
        for (int i = 0; i < 4; i++) sum += room[s % 2 * 4 * THREADS + (4 * threadIdx.x + 5 + i) % (4 * THREADS)];
        block_sync();
    }
    copy_async_wait<0>();
    sum = block_sum<THREADS>(sum, sums);
    if (threadIdx.x == 0) *y = sum;
}

__global__ void count_all(int32_t *counts, const int32_t *keys) {
    atomic_add(&counts[keys[blockIdx.x * THREADS + threadIdx.x]], 1);
}

/* ---- One mistake each ---- */

__global__ void no_block_sync(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    room[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = room[THREADS - 1 - threadIdx.x];
}

__global__ void no_second_sync(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    for (int i = 0; i < 2; i++) {
        room[threadIdx.x] = x[threadIdx.x] + static_cast<float>(i);
        block_sync();
        y[threadIdx.x] = room[THREADS - 1 - threadIdx.x];
    }
}

__global__ void no_warp_sync(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    room[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1); /* lanes meet here, which orders no memory */
    y[threadIdx.x] = room[threadIdx.x ^ 1];
}

__global__ void warp_synchronous_sum(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    room[threadIdx.x] = x[threadIdx.x];
    block_sync();
    for (unsigned step = 64; step > 0; step /= 2) {
        if (threadIdx.x < step) room[threadIdx.x] += room[threadIdx.x + step];
        if (step > 32) block_sync();
    }
    if (threadIdx.x == 0) *y = room[0];
}

__global__ void wrong_wait(float *y, const float *x) {
    DG_SHARED(float, room, 2 * THREADS);
    for (int i = 0; i < 2; i++) {
        copy_async<4>(room + i * THREADS + threadIdx.x, x + i * THREADS + threadIdx.x);
        copy_async_commit();
    }
    copy_async_wait<1>(); /* the second group is read too */
    block_sync();
    y[threadIdx.x] = room[threadIdx.x] + room[THREADS + threadIdx.x];
    copy_async_wait<0>();
}

__global__ void wait_without_barrier(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    copy_async<4>(room + threadIdx.x, x + threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    y[threadIdx.x] = room[(threadIdx.x + 40) % THREADS];
}

__global__ void never_waits(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    copy_async<4>(room + threadIdx.x, x + threadIdx.x);
    copy_async_commit();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void past_static(float *y, const float *x) {
    DG_SHARED(float, room, THREADS);
    float *const at = room;
    at[threadIdx.x + (threadIdx.x == THREADS - 1)] = x[threadIdx.x];
    block_sync();
    y[threadIdx.x] = 0.0f;
}

__global__ void past_dynamic(float *y, const float *x) {
    DG_DYNAMIC_SHARED(float, room);
    room[threadIdx.x + 1] = x[threadIdx.x];
    block_sync();
    y[threadIdx.x] = 0.0f;
}

__global__ void past_device(float *y, const float *x) { y[threadIdx.x + 8 * THREADS] = x[threadIdx.x]; }

__global__ void blocks_race(float *y, const float *x) {
    if (threadIdx.x == 0) y[0] = y[0] + x[blockIdx.x];
}

__global__ void lanes_part(float *y, const float *x) {
    if (threadIdx.x % 2) y[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);
    else y[threadIdx.x] = shuffle_xor(x[threadIdx.x], 3);
}

__global__ void barriers_part(float *y, const float *x) {
    if (threadIdx.x < 64) {
        block_sync();
    } else {
        block_sync();
    }
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void too_new(float *y, const float *x) {
    int32_t d[4] = {0};
    const uint32_t a[4] = {0}, b[2] = {0};
    mma_s8(d, a, b);
    y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(d[0]);
}

/* ---- What they run on ---- */

struct arrays {
    cudaStream_t stream;
    float *x, *y;
    float host[8 * THREADS];
};

static arrays prepare() {
    arrays a;
    CHECK(cudaStreamCreateWithFlags(&a.stream, cudaStreamNonBlocking) == cudaSuccess, "a stream");
    CHECK(cudaMalloc(reinterpret_cast<void **>(&a.x), sizeof a.host) == cudaSuccess &&
              cudaMalloc(reinterpret_cast<void **>(&a.y), sizeof a.host) == cudaSuccess,
          "memory");
    for (int i = 0; i < 8 * THREADS; i++) a.host[i] = static_cast<float>(i % 251);
    cudaMemcpyAsync(a.x, a.host, sizeof a.host, cudaMemcpyHostToDevice, a.stream);
    return a;
}

static void fetch(arrays &a) {
    cudaMemcpyAsync(a.host, a.y, sizeof a.host, cudaMemcpyDeviceToHost, a.stream);
    cudaStreamSynchronize(a.stream);
}

static void finish(arrays &a) {
    cudaFree(a.x);
    cudaFree(a.y);
    cudaStreamDestroy(a.stream);
}

/* ---- Right ones ---- */

static void test_right_kernels() {
    arrays a = prepare();
    dg_launch(reverse_blocks, dim3(8), dim3(THREADS), 0, a.stream, a.y, static_cast<const float *>(a.x));
    fetch(a);
    for (int i = 0; i < 8 * THREADS; i++) {
        const int from = i / THREADS * THREADS + THREADS - 1 - i % THREADS;
        CHECK(a.host[i] == static_cast<float>(from % 251), "item %d is %g", i, static_cast<double>(a.host[i]));
    }
    dg_launch(staged_sum, dim3(1), dim3(THREADS), 2 * 4 * THREADS * sizeof(float), a.stream, a.y,
              static_cast<const float *>(a.x), 2);
    fetch(a);
    float want = 0.0f;
    for (int i = 0; i < 8 * THREADS; i++) want += static_cast<float>(i % 251);
    CHECK(a.host[0] == want, "the sum is %g, not %g", static_cast<double>(a.host[0]), static_cast<double>(want));

    std::vector<int32_t> keys(8 * THREADS);
    for (int i = 0; i < 8 * THREADS; i++) keys[i] = i % 7;
    cudaMemcpyAsync(a.x, keys.data(), sizeof a.host, cudaMemcpyHostToDevice, a.stream);
    cudaMemsetAsync(a.y, 0, sizeof a.host, a.stream);
    dg_launch(count_all, dim3(8), dim3(THREADS), 0, a.stream, reinterpret_cast<int32_t *>(a.y),
              static_cast<const int32_t *>(static_cast<const void *>(a.x)));
    fetch(a);
    int32_t counts[7];
    memcpy(counts, a.host, sizeof counts);
    for (int i = 0; i < 7; i++) CHECK(counts[i] == (8 * THREADS + 6 - i) / 7, "%d of key %d", counts[i], i);
    finish(a);
}

/* Products of matrices against plain loops, through the fragments' documented layout. */
template <class ITEM, int K> __global__ void one_tile(float *d, const ITEM *a, const ITEM *b) {
    constexpr int N = 4 / sizeof(ITEM); /* items per register */
    const int l = lane_id();
    uint32_t ra[4], rb[2];
    for (int r = 0; r < 4; r++) memcpy(&ra[r], a + (l / 4 + r % 2 * 8) * K + l % 4 * N + r / 2 * 4 * N, 4);
    for (int r = 0; r < 2; r++) memcpy(&rb[r], b + l / 4 * K + l % 4 * N + r * 4 * N, 4);
    float out[4] = {0.0f};
    if constexpr (sizeof(ITEM) == 1) {
        int32_t sums[4] = {0};
        mma_s8(sums, ra, rb);
        for (int i = 0; i < 4; i++) out[i] = static_cast<float>(sums[i]);
    } else {
        mma_f16(out, ra, rb);
    }
    for (int i = 0; i < 4; i++) d[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = out[i];
}

/* The short product of int8, and bytes picked from two words. */
__global__ void short_tile(float *d, const int8_t *a, const int8_t *b) {
    const int l = lane_id();
    uint32_t ra[2], rb;
    for (int r = 0; r < 2; r++) memcpy(&ra[r], a + (l / 4 + r * 8) * 16 + l % 4 * 4, 4);
    memcpy(&rb, b + l / 4 * 16 + l % 4 * 4, 4);
    int32_t out[4] = {0};
    mma_s8_short(out, ra[0], ra[1], rb);
    for (int i = 0; i < 4; i++) d[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = static_cast<float>(out[i]);
}
__global__ void picked(float *d, const float *) {
    d[threadIdx.x] = static_cast<float>(pick_bytes(0x03020100u, 0x07060504u, 0xf0a4u + threadIdx.x));
}

/* a's and b's fragments through ldmatrix; b is stored [k][8], so its loads are transposed. */
__global__ void through_shared(float *d, const __half *a, const __half *b) {
    DG_SHARED(__half, sa, 16 * 16);
    DG_SHARED(__half, sb, 16 * 8);
    const int l = lane_id();
    for (int i = l; i < 16 * 16; i += WARP) sa[i] = a[i];
    for (int i = l; i < 16 * 8; i += WARP) sb[i] = b[i % 8 * 16 + i / 8];
    warp_sync();
    uint32_t ra[4], both[4];
    load_matrices(ra, sa + (l % 8 + l / 8 % 2 * 8) * 16 + l / 16 * 8);
    load_matrices_transposed(both, sb + l % 16 * 8);
    const uint32_t rb[2] = {both[0], both[1]};
    float out[4] = {0.0f};
    mma_f16(out, ra, rb);
    for (int i = 0; i < 4; i++) d[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = out[i];
}

template <class ITEM, int K>
static void check_tile(arrays &a, const std::vector<ITEM> &x, float (*value)(ITEM), const char *what) {
    fetch(a);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            float want = 0.0f;
            for (int k = 0; k < K; k++) want += value(x[i * K + k]) * value(x[16 * K + j * K + k]);
            CHECK(a.host[i * 8 + j] == want, "%s: %d, %d is %g, not %g", what, i, j,
                  static_cast<double>(a.host[i * 8 + j]), static_cast<double>(want));
        }
}

static void test_fragments() {
    arrays a = prepare();
    std::vector<int8_t> bytes(24 * 32);
    for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<int8_t>(i * 37 % 256 - 128);
    auto *at = reinterpret_cast<int8_t *>(a.x);
    cudaMemcpyAsync(at, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, a.stream);
    dg_launch(one_tile<int8_t, 32>, dim3(1), dim3(WARP), 0, a.stream, a.y, static_cast<const int8_t *>(at),
              static_cast<const int8_t *>(at + 16 * 32));
    check_tile<int8_t, 32>(a, bytes, [](int8_t v) { return static_cast<float>(v); }, "mma_s8");

    dg_launch(short_tile, dim3(1), dim3(WARP), 0, a.stream, a.y, static_cast<const int8_t *>(at),
              static_cast<const int8_t *>(at + 16 * 16));
    check_tile<int8_t, 16>(a, bytes, [](int8_t v) { return static_cast<float>(v); }, "mma_s8_short");
    dg_launch(picked, dim3(1), dim3(WARP), 0, a.stream, a.y, static_cast<const float *>(a.x));
    fetch(a);
    CHECK(a.host[0] == static_cast<float>(0x07000204u) && a.host[3] == static_cast<float>(0x07000207u),
          "picked %g and %g", static_cast<double>(a.host[0]), static_cast<double>(a.host[3]));

    std::vector<__half> halves(24 * 16);
    for (size_t i = 0; i < halves.size(); i++) halves[i] = __float2half(static_cast<float>(i * 37 % 32) - 16.0f);
    auto *half_at = reinterpret_cast<__half *>(a.x);
    cudaMemcpyAsync(half_at, halves.data(), halves.size() * 2, cudaMemcpyHostToDevice, a.stream);
    dg_launch(one_tile<__half, 16>, dim3(1), dim3(WARP), 0, a.stream, a.y, static_cast<const __half *>(half_at),
              static_cast<const __half *>(half_at + 16 * 16));
    check_tile<__half, 16>(a, halves, [](__half v) { return __half2float(v); }, "mma_f16");
    dg_launch(through_shared, dim3(1), dim3(WARP), 0, a.stream, a.y, static_cast<const __half *>(half_at),
              static_cast<const __half *>(half_at + 16 * 16));
    check_tile<__half, 16>(a, halves, [](__half v) { return __half2float(v); }, "ldmatrix");
    finish(a);
}

/* Two streams, an event between them, as they are and recorded into a graph that runs twice. */
static void test_streams_and_graphs() {
    arrays a = prepare();
    cudaStream_t other;
    cudaEvent_t there, back;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&there, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&back, cudaEventDisableTiming);
    const auto turn_twice = [&] {
        dg_launch(reverse_blocks, dim3(8), dim3(THREADS), 0, a.stream, a.y, static_cast<const float *>(a.x));
        cudaEventRecord(there, a.stream);
        cudaStreamWaitEvent(other, there, 0);
        dg_launch(reverse_blocks, dim3(8), dim3(THREADS), 0, other, a.x, static_cast<const float *>(a.y));
        cudaEventRecord(back, other);
        cudaStreamWaitEvent(a.stream, back, 0);
        dg_launch(reverse_blocks, dim3(8), dim3(THREADS), 0, a.stream, a.y, static_cast<const float *>(a.x));
    };
    turn_twice();
    fetch(a);
    CHECK(a.host[0] == THREADS - 1 && a.host[THREADS - 1] == 0.0f, "the streams' order");
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(a.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess, "recording");
    turn_twice();
    CHECK(cudaStreamEndCapture(a.stream, &graph) == cudaSuccess &&
              cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess,
          "a graph");
    cudaMemsetAsync(a.y, 0, sizeof a.host, a.stream);
    fetch(a);
    CHECK(a.host[0] == 0.0f, "recording runs nothing");
    for (int i = 0; i < 2; i++) cudaGraphLaunch(ready, a.stream);
    fetch(a);
    CHECK(a.host[0] == THREADS - 1 && a.host[THREADS - 1] == 0.0f, "the graph's order");
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    cudaEventDestroy(there);
    cudaEventDestroy(back);
    cudaStreamDestroy(other);
    finish(a);
}

/* ---- Wrong ones ---- */

typedef void (*mistake)(arrays &a);

/* Runs it in a process of its own with some seeds; is the line it ends with what was expected, with any of them? */
static bool is_found(mistake wrong, const char *expected, std::string &said) {
    for (uint64_t seed = 0; seed < 4; seed++) {
        int ends[2];
        if (pipe(ends)) return false;
        fflush(nullptr);
        const pid_t child = fork();
        if (child == 0) {
            dup2(ends[1], 2);
            shim::seed(seed);
            arrays a = prepare();
            wrong(a);
            cudaDeviceSynchronize();
            _exit(0);
        }
        close(ends[1]);
        char line[4096];
        said.clear();
        for (ssize_t n; (n = read(ends[0], line, sizeof line)) > 0;) said.append(line, static_cast<size_t>(n));
        close(ends[0]);
        int status;
        waitpid(child, &status, 0);
        if (!(WIFEXITED(status) && WEXITSTATUS(status) == 0) && said.find(expected) != std::string::npos) return true;
    }
    return false;
}

/* The values of `right` differ from what comes out with some seed. */
static bool is_seen(void (*kernel)(float *, const float *), float (*right)(int i)) {
    for (uint64_t seed = 0; seed < 4; seed++) {
        shim::seed(seed);
        arrays a = prepare();
        dg_launch(kernel, dim3(1), dim3(THREADS), 0, a.stream, a.y, static_cast<const float *>(a.x));
        fetch(a);
        bool wrong = false;
        for (int i = 0; i < THREADS; i++) wrong |= !(a.host[i] == right(i));
        finish(a);
        if (wrong) return true;
    }
    return false;
}

template <void (*KERNEL)(float *, const float *)> static void run(arrays &a) {
    dg_launch(KERNEL, dim3(4), dim3(THREADS), KERNEL == past_dynamic ? THREADS * sizeof(float) : 0, a.stream, a.y,
              static_cast<const float *>(a.x));
}

static void test_mistakes(bool races, bool asan) {
    const struct {
        const char *name;
        mistake wrong;
        const char *expected, *expected_asan;
        bool always; /* seen without the race checker as well */
    } mistakes[] = {
        {"a missing block_sync", run<no_block_sync>, "race: byte", nullptr, false},
        {"a missing block_sync in a loop", run<no_second_sync>, "race: byte", nullptr, false},
        {"a missing warp_sync", run<no_warp_sync>, "race: byte", nullptr, false},
        {"a warp-synchronous sum", run<warp_synchronous_sum>, "race: byte", nullptr, false},
        {"a wait for too few copies", run<wrong_wait>, "was not waited for", nullptr, false},
        {"a wait without a barrier", run<wait_without_barrier>, "race: byte", nullptr, false},
        {"copies never waited for", run<never_waits>, "never waited for", nullptr, true},
        {"a static array overrun", run<past_static>, "out of bounds of shared memory", "use-after-poison", false},
        {"dynamic memory overrun", run<past_dynamic>, "out of bounds of shared memory", "use-after-poison", false},
        {"device memory overrun", run<past_device>, "out of bounds of device memory", "use-after-poison", false},
        {"blocks that race", run<blocks_race>, "race: byte", nullptr, false},
        {"lanes that part", run<lanes_part>, "lanes of a warp part", nullptr, true},
        {"barriers that part", run<barriers_part>, "threads of a block wait at", nullptr, true},
        {"an instruction too new",
         [](arrays &a) {
             shim::architecture = 75;
             run<too_new>(a);
         },
         "mma_s8 needs sm_80", nullptr, true},
        {"host code that reads device memory",
         [](arrays &a) {
             cudaDeviceSynchronize();
             volatile float v = a.x[0];
             (void)v;
         },
         "host code touches device memory", nullptr, true},
        {"a copy of the wrong direction",
         [](arrays &a) { cudaMemcpyAsync(a.x, a.host, 4, cudaMemcpyDeviceToHost, a.stream); }, "against its direction",
         nullptr, true},
        {"a copy that is too long",
         [](arrays &a) { cudaMemcpyAsync(a.y, a.x, sizeof a.host + 4, cudaMemcpyDeviceToDevice, a.stream); },
         "leaves its allocation", nullptr, true},
        {"memory during recording",
         [](arrays &a) {
             void *p;
             cudaStreamBeginCapture(a.stream, cudaStreamCaptureModeThreadLocal);
             cudaMalloc(&p, 4);
         },
         "while a graph is recorded", nullptr, true},
        {"the default stream",
         [](arrays &a) {
             dg_launch(reverse_blocks, dim3(1), dim3(THREADS), 0, nullptr, a.y, static_cast<const float *>(a.x));
         },
         "default stream", nullptr, true},
    };
    for (const auto &m : mistakes) {
        const char *expected = asan && m.expected_asan ? m.expected_asan : m.expected;
        if (!(m.always || races || (asan && m.expected_asan))) continue;
        std::string said;
        const bool caught = is_found(m.wrong, expected, said);
        CHECK(caught, "%s was not found; it said '%s'", m.name, said.c_str());
        if (caught) printf("found: %s\n", m.name);
    }
    /* without any checker, seeds show some of them by their results */
    if (!races && !asan) {
        const auto reversed = [](int i) { return static_cast<float>(THREADS - 1 - i); };
        CHECK(is_seen(no_block_sync, reversed), "a missing block_sync shows in no seed");
        CHECK(
            is_seen(wrong_wait, [](int i) { return static_cast<float>(i) + static_cast<float>((i + THREADS) % 251); }),
            "a wrong wait shows in no seed");
        CHECK(is_seen(no_warp_sync, [](int i) { return static_cast<float>(i); }),
              "a missing warp_sync shows in no seed");
    }
    const auto late = [] { /* an event that is not waited for */
                           arrays a = prepare();
                           cudaStream_t other;
                           cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
                           dg_launch(reverse_blocks, dim3(8), dim3(THREADS), 0, other, a.y,
                                     static_cast<const float *>(a.x));
                           cudaStreamSynchronize(a.stream);
                           fetch(a);
                           cudaStreamSynchronize(other);
                           const bool wrong = a.host[0] != static_cast<float>(THREADS - 1);
                           cudaStreamDestroy(other);
                           finish(a);
                           return wrong;
    };
    bool seen = false;
    for (uint64_t s = 0; s < 8; s++) {
        shim::seed(s);
        seen |= late();
    }
    CHECK(seen, "a missing wait for an event shows in no seed");
}

int main(int argc, char **argv) {
    const bool races = argc > 1 && strcmp(argv[1], "races") == 0, asan = argc > 1 && strcmp(argv[1], "asan") == 0;
    for (uint64_t s = 0; s < 16; s++) {
        shim::seed(s);
        shim::architecture = 80;
        test_fragments();
        for (int architecture : {80, 75}) {
            shim::architecture = architecture;
            test_right_kernels();
            test_streams_and_graphs();
        }
    }
    shim::architecture = 80;
    test_mistakes(races, asan);
    return check_done("cuda shim");
}
