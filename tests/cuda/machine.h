/* Between the parts of the emulation: memory that they watch, and runs of kernels. */
#ifndef MACHINE_H
#define MACHINE_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <functional>

namespace shim {

/* Device memory is one range, shared memory of all kernels another; both have gaps that nobody may touch. */
enum : size_t { DEVICE_BYTES = size_t(4) << 30, SHARED_BYTES = size_t(16) << 20, GAP = 256 };
extern unsigned char *device_memory, *shared_memory;
inline bool in_device(const void *p) { return size_t((const unsigned char *)p - device_memory) < DEVICE_BYTES; }
inline bool in_shared(const void *p) { return size_t((const unsigned char *)p - shared_memory) < SHARED_BYTES; }

/* What may be touched in them: both checkers (ASan's shadow, the race checker's) are told. */
void allow(void *p, size_t bytes);
void forbid(void *p, size_t bytes);
void device_open(bool open); /* device memory can be read and written only while a kernel or a copy runs */

struct run {
    std::function<void()> kernel;
    dim3 grid, block;
    size_t shared;
};
void run_kernel(const run &r);
/* Puts a run into a stream (the fake runtime). */
cudaError_t enqueue(const run &r, cudaStream_t stream);
/* The device is lost: what it was given is never done, what was recorded is gone. */
void lose();

/* ---- The race checker, if it is linked; accesses are told by the compiler's hooks ---- */
struct clocks {
    uint32_t launch, block, warp; /* when the kernel began, and the last barrier of the block and of the warp */
};
extern uint32_t now;              /* counts barriers */
extern bool races_watched;
extern uint8_t
    *watched_valid[2]; /* per byte of device and shared memory: 1 may be touched, 2 a copy to it is on its way */
/* Of the thread that runs. */
uint32_t thread_number(); /* in the grid, + 1 */
uint32_t threads_of_block();
clocks thread_clocks();
void touched(const void *p, size_t bytes, bool writes, bool atomic, const void *pc);

} // namespace shim

#endif
