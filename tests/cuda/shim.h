/* Emulates cuda/device.h on the host, for tests only: every CUDA thread is a fiber of one OS thread, blocks run
 * one after another, and operations of a warp wait until all lanes have brought theirs. Seeds decide the order of
 * threads and blocks and when asynchronous copies happen. What a device would leave undefined ends the program with a
 * line that says where (exit status shim::FOUND).
 */
#ifndef SHIM_H
#define SHIM_H

#include <cstddef>
#include <cstring>
#include <functional>
#include <tuple>

#define __launch_bounds__(...)
#define DG_UNROLL
constexpr bool runs_here(bool) { return true; }

namespace shim {

enum { FOUND = 99 };
/* Prints one line about the kernel's thread, or the host, and exits. */
[[noreturn]] void found(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The order of everything that has no order. 0: threads and blocks as numbered, copies as late as they may be. */
void seed(uint64_t value);
uint32_t random_number(); /* of the seed's sequence */
/* The compute capability that wrappers and the runtime have: 75, 80, ... */
extern int architecture;

struct thread;
extern thread *self; /* NULL while host code runs */
struct thread {
    uint3 index;
};
extern uint3 block_index;
extern dim3 block_size, grid_size;

struct site {
    const char *file;
    int line;
};
#define SHIM_SITE shim::site at = {__builtin_FILE(), __builtin_LINE()}

void block_barrier(site at);
void warp_barrier(site at);
/* Lanes bring bytes_in each; the last one to come makes all results of bytes_out each (at most 64 of either). */
using lanes_work = void (*)(const unsigned char (*in)[64], unsigned char (*out)[64]);
void warp_together(const char *what, const void *in, size_t bytes_in, void *out, size_t bytes_out, lanes_work work,
                   site at);

/* Shared memory: of the block that runs, filled with 0xFF before each block. */
void *shared_static(size_t bytes);
void *shared_dynamic();
uint32_t shared_address(const void *p, size_t bytes); /* checked */

void copy(void *to_shared, const void *from_global, int bytes, bool valid);
void copy_commit();
void copy_wait(int groups_left);

/* An access that races with plain accesses of other threads but not with its like. */
void atomic_access(void *at, size_t bytes);

void need(int least_architecture, const char *what);

cudaError_t launch(std::function<void()> kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream);

} // namespace shim

#define threadIdx (shim::self->index)
#define blockIdx shim::block_index
#define blockDim shim::block_size
#define gridDim shim::grid_size

#define DG_SHARED(type, name, count)                                               \
    static void *const name##_place = shim::shared_static(sizeof(type) * (count)); \
    type(&name)[count] = *static_cast<type(*)[count]>(name##_place)
#define DG_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(shim::shared_dynamic())

inline void block_sync(SHIM_SITE) { shim::block_barrier(at); }
inline void warp_sync(SHIM_SITE) { shim::warp_barrier(at); }

template <class T> struct shim_shuffle {
    T v;
    int from;
    static void work(const unsigned char (*in)[64], unsigned char (*out)[64]) {
        for (int l = 0; l < WARP; l++) {
            shim_shuffle mine, theirs;
            memcpy(&mine, in[l], sizeof mine);
            memcpy(&theirs, in[mine.from], sizeof theirs);
            memcpy(out[l], &theirs.v, sizeof theirs.v);
        }
    }
    static T run(const char *what, T v, int from, shim::site at) {
        unsigned char room[sizeof(shim_shuffle)] = {0}; /* no uninitialised gaps */
        const shim_shuffle mine = {v, from};
        memcpy(room, &mine, sizeof mine);
        T out;
        shim::warp_together(what, room, sizeof room, &out, sizeof out, work, at);
        return out;
    }
};
inline int shim_lane() { return static_cast<int>(threadIdx.x % 32); }
template <class T> inline T shuffle(T v, int lane, SHIM_SITE) {
    return shim_shuffle<T>::run("shuffle", v, lane & 31, at);
}
template <class T> inline T shuffle_xor(T v, int mask, SHIM_SITE) {
    return shim_shuffle<T>::run("shuffle_xor", v, (shim_lane() ^ mask) & 31, at);
}
template <class T> inline T shuffle_up(T v, int delta, SHIM_SITE) {
    const int from = shim_lane() - delta;
    return shim_shuffle<T>::run("shuffle_up", v, from < 0 ? shim_lane() : from, at);
}
template <class T> inline T shuffle_down(T v, int delta, SHIM_SITE) {
    const int from = shim_lane() + delta;
    return shim_shuffle<T>::run("shuffle_down", v, from > 31 ? shim_lane() : from, at);
}
uint32_t lanes_where(bool holds, SHIM_SITE);

inline int count_bits(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}

int32_t atomic_add(int32_t *at, int32_t v);
void atomic_add(int64_t *at, int64_t v);
void atomic_claim(int32_t *at, int32_t v);
int32_t atomic_or(int32_t *at, int32_t v);
int32_t atomic_max(int32_t *at, int32_t v);

inline uint32_t shared_address(const void *p) { return shim::shared_address(p, 1); }
template <int BYTES> inline void copy_async(void *to_shared, const void *from_global, bool valid = true) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
    shim::copy(to_shared, from_global, BYTES, valid);
}
inline void copy_async_commit() { shim::copy_commit(); }
template <int N> inline void copy_async_wait() { shim::copy_wait(N); }

void load_matrices(uint32_t (&r)[4], const void *shared_row, SHIM_SITE);
void load_matrices_transposed(uint32_t (&r)[4], const void *shared_row, SHIM_SITE);
void load_matrices(uint32_t (&r)[2], const void *shared_row, SHIM_SITE);
void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE);
void mma_s8_short(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, SHIM_SITE);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_SITE);
inline int32_t dp4a(int32_t a, int32_t b, int32_t c) {
    int8_t x[4], y[4];
    memcpy(x, &a, 4);
    memcpy(y, &b, 4);
    for (int i = 0; i < 4; i++) c += x[i] * y[i];
    return c;
}

template <class... P, class... A>
inline cudaError_t dg_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                             A... args) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    const std::tuple<P...> given(args...);
    return shim::launch([kernel, given] { std::apply(kernel, given); }, grid, block, shared, stream);
}

#endif
