#define _GNU_SOURCE /* getrusage */
/* Runs a target over files, each as it is, and over COUNT random mutations of them: target COUNT FILE... FUZZ_SEED
 * makes others. With FUZZ_SECONDS and FUZZ_MIB set, a run that takes more processor time, or a process that took more
 * memory, counts as a crash. */
#include "fuzz.h"

#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { ROOM = 1 << 20 };

#pragma weak LLVMFuzzerCustomMutator

static uint64_t state = 1;
static size_t below(size_t n) { /* splitmix64 */
    uint64_t z = (state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return n ? (size_t)((z ^ z >> 31) % n) : 0;
}

/* What libFuzzer brings with it: a byte changed, put in or taken out, or a stretch copied. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t room) {
    const size_t at = below(n), from = below(n), length = 1 + below(n - (at > from ? at : from) < 16 ? 1 : 16);
    switch (n ? below(4) : 1) {
    case 0: data[at] = (uint8_t)below(256); return n;
    case 1:
        if (n == room) return n;
        memmove(data + at + 1, data + at, n - at);
        data[at] = (uint8_t)below(256);
        return n + 1;
    case 2: memmove(data + at, data + at + 1, n - at - 1); return n > 1 ? n - 1 : n;
    default: memmove(data + at, data + from, at + length > n || from + length > n ? 1 : length); return n;
    }
}

static double seconds(void) { return (double)clock() / CLOCKS_PER_SEC; } /* of the processor */

static double mebibytes(void) {
    struct rusage most;
    getrusage(RUSAGE_SELF, &most);
#ifdef __APPLE__
    return (double)most.ru_maxrss / 1048576.0;
#else
    return (double)most.ru_maxrss / 1024.0;
#endif
}

static double limit(const char *name) {
    const char *text = getenv(name);
    return text ? atof(text) : 1e30;
}

static double slowest;

/* In a buffer of exactly its size, so that a read past its end is found. */
static void run(const uint8_t *data, size_t n) {
    uint8_t *copy = malloc(n ? n : 1);
    MUST(copy, "no memory");
    memcpy(copy, data, n);
    const double begin = seconds();
    LLVMFuzzerTestOneInput(copy, n);
    const double taken = seconds() - begin;
    if (taken > slowest) slowest = taken;
    MUST(taken <= limit("FUZZ_SECONDS"), "%.3f s", taken);
    MUST(mebibytes() <= limit("FUZZ_MIB"), "%.0f MiB", mebibytes());
    free(copy);
}

static void keep(const char *path, const uint8_t *data, size_t n) {
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(data, 1, n, f) == n, "%s", path);
    fclose(f);
}

int main(int argc, char **argv) {
    static uint8_t original[ROOM], data[ROOM];
    MUST(argc > 2, "usage: %s COUNT FILE...", argv[0]);
    const char *last = getenv("FUZZ_LAST"); /* each mutation is written here before it runs: what it was that crashed */
    const long count = atol(argv[1]);
    if (getenv("FUZZ_SEED")) state = strtoull(getenv("FUZZ_SEED"), NULL, 10);
    long runs = 0;
    for (int i = 2; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        MUST(f, "cannot open %s", argv[i]);
        const size_t n = fread(original, 1, ROOM, f);
        fclose(f);
        run(original, n);
        const long from = count * (i - 2) / (argc - 2), to = count * (i - 1) / (argc - 2);
        for (long k = from; k < to; k++) {
            memcpy(data, original, n);
            size_t left = n;
            for (size_t times = 1 + below(4); times > 0; times--)
                left = LLVMFuzzerCustomMutator ? LLVMFuzzerCustomMutator(data, left, ROOM, (unsigned)below(SIZE_MAX))
                                               : LLVMFuzzerMutate(data, left, ROOM);
            if (last) keep(last, data, left);
            run(data, left);
        }
        runs += to - from + 1;
    }
    const char *name = strrchr(argv[0], '/');
    printf("fuzz %s: %d files, %ld runs, the slowest %.3f s, %.0f MiB\n", name ? name + 1 : argv[0], argc - 2, runs,
           slowest, mebibytes());
    return 0;
}
