/* The race checker: kernels are compiled with -fsanitize=thread, and these are the functions that the compiler calls at
 * every access. Per byte they keep who wrote last and who read last (two different threads), and when: two accesses of
 * different threads, one of them a write, need a barrier of the block between them, or of the warp for lanes of one
 * warp; between blocks nothing orders them but the end of the kernel.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

constexpr int WARP = 32;
#include "machine.h"
#include "shim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace shim {

enum : uint32_t { ATOMIC = 1u << 31 };

struct access {
    uint32_t time, thread; /* thread 0: nobody */
};
struct history {
    access wrote, read, read_too;
};
static history *histories[2];

static bool watch() {
    races_watched = true;
    const size_t sizes[2] = {DEVICE_BYTES, SHARED_BYTES};
    for (int i = 0; i < 2; i++) {
        void *p = mmap(nullptr, sizes[i] * sizeof(history), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        histories[i] = static_cast<history *>(p);
    }
    return true;
}
static const bool watching = watch();

/* "kernel at file:line" of an address in the program. */
static void describe(const void *pc, char *out, size_t size) {
    snprintf(out, size, "?");
    Dl_info where;
    if (!pc || !dladdr(pc, &where)) return;
    char command[400];
    snprintf(command, sizeof command, "addr2line -C -f -s -i -e '%s' %#zx 2>/dev/null", where.dli_fname,
             size_t(static_cast<const char *>(pc) - static_cast<const char *>(where.dli_fbase)) - 1);
    FILE *f = popen(command, "r");
    if (!f) return;
    const size_t n = fread(out, 1, size - 1, f);
    out[n] = 0;
    for (char *c = out; *c; c++)
        if (*c == '\n') *c = ' ';
    pclose(f);
}

[[noreturn]] static void report(const char *what, const void *p, bool writes, const access &other, const void *pc) {
    static char where[1000];
    describe(pc, where, sizeof where);
    const uint32_t per_block = threads_of_block(), them = (other.thread & ~ATOMIC) - 1, me = thread_number() - 1;
    if (other.thread)
        found("%s: byte %#zx of %s memory, %s by thread %u of block %u, and by thread %u of block %u before, with no "
              "barrier between; %.300s",
              what, size_t(static_cast<const unsigned char *>(p) - (in_device(p) ? device_memory : shared_memory)),
              in_device(p) ? "device" : "shared", writes ? "written" : "read", me % per_block, me / per_block,
              them % per_block, them / per_block, where);
    found("%s: byte %#zx of %s memory; %.300s", what,
          size_t(static_cast<const unsigned char *>(p) - (in_device(p) ? device_memory : shared_memory)),
          in_device(p) ? "device" : "shared", where);
}

void touched(const void *p, size_t bytes, bool writes, bool atomic, const void *pc) {
    if (!self) return;
    const bool device = in_device(p);
    if (!device && !in_shared(p)) return;
    const size_t first = size_t(static_cast<const unsigned char *>(p) - (device ? device_memory : shared_memory));
    const uint8_t *valid = watched_valid[device ? 0 : 1] + first;
    history *h = histories[device ? 0 : 1] + first;
    const clocks c = thread_clocks();
    const uint32_t me = thread_number(), per_block = threads_of_block(), my_block = (me - 1) / per_block,
                   my_warp = (me - 1) / WARP;
    const auto races = [&](const access &a) {
        const uint32_t them = a.thread & ~ATOMIC;
        if (!a.thread || a.time < c.launch || them == me || (atomic && (a.thread & ATOMIC))) return false;
        if ((them - 1) / per_block != my_block) return device; /* shared memory is another block's own */
        return a.time >= c.block && !((them - 1) / WARP == my_warp && a.time < c.warp);
    };
    const access mine = {now, me | (atomic ? ATOMIC : 0u)};
    for (size_t i = 0; i < bytes; i++, h++) {
        const auto *at = static_cast<const unsigned char *>(p) + i;
        if (valid[i] == 0)
            report(device ? "out of bounds of device memory" : "out of bounds of shared memory", at, writes, {0, 0},
                   pc);
        if (valid[i] == 2) report("an asynchronous copy to it was not waited for", at, writes, {0, 0}, pc);
        if (races(h->wrote)) report("race", at, writes, h->wrote, pc);
        if (writes) {
            if (races(h->read)) report("race", at, writes, h->read, pc);
            if (races(h->read_too)) report("race", at, writes, h->read_too, pc);
            h->wrote = mine;
        } else {
            if (h->read.thread != mine.thread) h->read_too = h->read;
            h->read = mine;
        }
    }
}

} // namespace shim

using shim::touched;
#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
#define ACCESS(bytes)                                                                   \
    void __tsan_read##bytes(void *p) { touched(p, bytes, false, false, PC); }           \
    void __tsan_write##bytes(void *p) { touched(p, bytes, true, false, PC); }           \
    void __tsan_unaligned_read##bytes(void *p) { touched(p, bytes, false, false, PC); } \
    void __tsan_unaligned_write##bytes(void *p) { touched(p, bytes, true, false, PC); } \
    void __tsan_volatile_read##bytes(void *p) { touched(p, bytes, false, false, PC); }  \
    void __tsan_volatile_write##bytes(void *p) { touched(p, bytes, true, false, PC); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void *p, size_t n) { touched(p, n, false, false, PC); }
void __tsan_write_range(void *p, size_t n) { touched(p, n, true, false, PC); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

/* The host's atomics, which no kernel has. */
#define HOST_ATOMIC(bits)                                                                               \
    uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *p, int) {                  \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                    \
    }                                                                                                   \
    void __tsan_atomic##bits##_store(volatile uint##bits##_t *p, uint##bits##_t v, int) {               \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                   \
    uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t *p, uint##bits##_t v, int) { \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                              \
    }
HOST_ATOMIC(32)
HOST_ATOMIC(64)

/* Of kernels' own calls (linked with --wrap). */
void *__real_memcpy(void *, const void *, size_t);
void *__real_memset(void *, int, size_t);
void *__wrap_memcpy(void *to, const void *from, size_t n) {
    touched(from, n, false, false, PC);
    touched(to, n, true, false, PC);
    return __real_memcpy(to, from, n);
}
void *__wrap_memset(void *to, int v, size_t n) {
    touched(to, n, true, false, PC);
    return __real_memset(to, v, n);
}
}
