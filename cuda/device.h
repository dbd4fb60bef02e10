/* The only include of a kernel: what a device can do, behind names that a test may put a host emulation under.
 *
 * Everything that is inline PTX lives here. A kernel uses these wrappers, threadIdx and the like, DG_SHARED and
 * DG_DYNAMIC_SHARED for shared memory, and is started by dg_launch. What an architecture lacks traps. Where nvcc
 * compiles, the wrappers are below; anywhere else `shim.h` (tests/cuda) has the same names.
 */
#ifndef DG_DEVICE_H
#define DG_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

constexpr int WARP = 32;

/* Before the name of a kernel that a step spends its time in: threads per block, and how many blocks of a processor
 * registers are to last for; `make cubins` fails if it spills. */
#define DG_HOT(...) __launch_bounds__(__VA_ARGS__)

#ifndef __CUDACC__
#include "shim.h"
#else

#ifdef __CUDA_ARCH__
#define DG_ARCH (__CUDA_ARCH__ / 10) /* 75, 80, ...: the one place that asks */
#else
#define DG_ARCH 0
#endif

#define DG_UNROLL _Pragma("unroll")

/* Which form of a kernel this target runs, with tensor cores or without: the other stays empty. */
__device__ constexpr bool runs_here(bool tensor) { return tensor == (DG_ARCH >= 80); }

/* A shared array of the block's own, and the block's dynamic shared memory (16-byte aligned, one view per kernel). */
#define DG_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DG_DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char dg_dynamic_shared[]; \
    type *const name = reinterpret_cast<type *>(dg_dynamic_shared)

__device__ inline void block_sync() { __syncthreads(); }
__device__ inline void warp_sync() { __syncwarp(); }

/* ---- Lanes of a warp; all 32 take part ---- */

template <class T> __device__ inline T shuffle(T v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <class T> __device__ inline T shuffle_xor(T v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <class T> __device__ inline T shuffle_up(T v, int delta) { return __shfl_up_sync(0xffffffffu, v, delta); }
template <class T> __device__ inline T shuffle_down(T v, int delta) { return __shfl_down_sync(0xffffffffu, v, delta); }
__device__ inline uint32_t lanes_where(bool holds) { return __ballot_sync(0xffffffffu, holds); }

__device__ inline int count_bits(uint32_t v) { return __popc(v); }
/* Four of the eight bytes of low and high (4 to 7), named by the low three bits of each of the selector's four
 * nibbles. */
__device__ inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector & 0x7777u);
}

/* ---- Atomics on integers: those on floats would make results depend on the order of threads ---- */

__device__ inline int32_t atomic_add(int32_t *at, int32_t v) { return atomicAdd(at, v); }
__device__ inline void atomic_add(int64_t *at, int64_t v) {
    atomicAdd(reinterpret_cast<unsigned long long *>(at), static_cast<unsigned long long>(v));
}
__device__ inline int32_t atomic_or(int32_t *at, int32_t v) { return atomicOr(at, v); }
/* *at = v where it is 0 */
__device__ inline void atomic_claim(int32_t *at, int32_t v) { atomicCAS(at, 0, v); }
__device__ inline int32_t atomic_max(int32_t *at, int32_t v) { return atomicMax(at, v); }

/* ---- Copies from global to shared memory that go on while the thread does; without them (sm_75) they are done at
 * once ---- */

__device__ inline uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/* BYTES (4, 8 or 16, both sides aligned to it); where not `valid`, zeros are written and nothing is read. */
template <int BYTES> __device__ inline void copy_async(void *to_shared, const void *from_global, bool valid = true) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
#if DG_ARCH >= 80
    const int bytes = valid ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to_shared)),
                     "l"(from_global), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to_shared)),
                     "l"(from_global), "n"(BYTES), "r"(bytes)
                     : "memory");
#else
    uint32_t *to = static_cast<uint32_t *>(to_shared);
    const uint32_t *from = static_cast<const uint32_t *>(from_global);
    DG_UNROLL for (int i = 0; i < BYTES / 4; i++)
        to[i] = valid ? from[i] : 0u;
#endif
}
/* Closes a group of this thread's copies. */
__device__ inline void copy_async_commit() {
#if DG_ARCH >= 80
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
/* Until all but the thread's last N groups are done. Other threads' copies: block_sync() after it. */
template <int N> __device__ inline void copy_async_wait() {
#if DG_ARCH >= 80
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

/* ---- Matrix fragments (PTX ISA, "Matrix multiply-accumulate operation using mma instruction") ---- */

/* Four 8x8 matrices of 16-bit items; lane l names row l % 8 (16 bytes) of matrix l / 8. */
__device__ inline void load_matrices(uint32_t (&r)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
/* Two of them; lanes 0 to 15 name the rows. */
__device__ inline void load_matrices(uint32_t (&r)[2], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

/* d[16][8] += a[16][32] b[8][32]^T in int8 and int32. sm_80 */
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if DG_ARCH >= 80
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
/* d[16][8] += a[16][16] b[8][16]^T in int8 and int32: half the registers of the above. sm_80 */
__device__ inline void mma_s8_short(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if DG_ARCH >= 80
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
#else
    __trap();
#endif
}
/* d[16][8] += a[16][16] b[8][16]^T in binary16 and float32. sm_80 */
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if DG_ARCH >= 80
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
/* The same in bfloat16. sm_80 */
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if DG_ARCH >= 80
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
/* c + the sum of four products of int8. */
__device__ inline int32_t dp4a(int32_t a, int32_t b, int32_t c) { return __dp4a(a, b, c); }

/* ---- Starting a kernel; shared: bytes of dynamic shared memory ---- */

template <class... P, class... A>
inline cudaError_t dg_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                             A... args) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    if (shared > 48 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
    const auto start = [&](P... converted) {
        void *pointers[] = {static_cast<void *>(&converted)...};
        return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, block, pointers, shared, stream);
    };
    return start(args...);
}

#endif /* __CUDACC__ */

/* ---- What follows from the wrappers ---- */

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % WARP); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / WARP); }

/* All lanes get the result; the order of the additions is fixed. */
template <class T> __device__ inline T warp_sum(T v) {
    DG_UNROLL for (int mask = WARP / 2; mask > 0; mask /= 2)
        v += shuffle_xor(v, mask);
    return v;
}
template <class T> __device__ inline T warp_max(T v) {
    DG_UNROLL for (int mask = WARP / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(v, mask);
        v = other > v ? other : v;
    }
    return v;
}
/* The same over a block of THREADS in one dimension; scratch: [THREADS / WARP], free again at the next block_sync(). */
template <int THREADS, class T> __device__ inline T block_sum(T v, T *scratch) {
    v = warp_sum(v);
    if (lane_id() == 0) scratch[warp_id()] = v;
    block_sync();
    T sum = T(0);
    for (int i = 0; i < THREADS / WARP; i++) sum += scratch[i];
    return sum;
}
template <int THREADS, class T> __device__ inline T block_max(T v, T *scratch) {
    v = warp_max(v);
    if (lane_id() == 0) scratch[warp_id()] = v;
    block_sync();
    T most = scratch[0];
    for (int i = 1; i < THREADS / WARP; i++) most = scratch[i] > most ? scratch[i] : most;
    return most;
}

/* Two numbers in binary16. */
__device__ inline uint32_t half_pair(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

__device__ inline float gelu_tanh(float v) {
    return 0.5f * v * (1.0f + tanhf(0.79788456080286535588f * fmaf(0.044715f * v * v, v, v)));
}

#endif
