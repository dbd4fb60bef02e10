/* Measures the machine's limits: chains of instructions on registers, reading of memory, and reading of a disk. */
#include <stdlib.h>

#include "os.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    ROUNDS = 1 << 16,          /* of a chain, per item of the pool: some milliseconds */
    ITEMS = 8,                 /* per thread */
    REPEATS = 12,              /* the best counts: others may use the machine */
    STRETCH = 1 << 22,         /* bytes of memory per item */
    STRETCHES = 128,           /* more than caches hold */
    ADDITIONS = 1 << 22,
};

/* Keeps the compiler from computing a chain once and for all, and from moving it. */
#define OPAQUE(x) __asm__ volatile("" : "+r"(x))

double dg_clock(void) {
    double best = 0.0;
    for (int r = 0; r < REPEATS * 2; r++) {
        uint64_t x = 1, step = 3;
        OPAQUE(step);
        const uint64_t began = os_nanoseconds();
        for (int i = 0; i < ADDITIONS / 16; i++) {
#define ADD4   \
    x += step; \
    OPAQUE(x); \
    x += step; \
    OPAQUE(x); \
    x += step; \
    OPAQUE(x); \
    x += step; \
    OPAQUE(x);
            ADD4 ADD4 ADD4 ADD4
        }
        const double hz = ADDITIONS / (1e-9 * (double)(os_nanoseconds() - began));
        if (hz > best) best = hz;
    }
    return best;
}

/* ---- Memory ---- */

/* Sums a stretch; returns bytes. */
static double read_memory(void *arg, int64_t item) {
    const uint64_t *at = (const uint64_t *)(const void *)((const char *)arg + item % STRETCHES * STRETCH);
    uint64_t sum = 0;
    for (int64_t i = 0; i < STRETCH / 8; i++) sum += at[i];
    OPAQUE(sum);
    return STRETCH;
}

/* ---- Disk ---- */

double dg_disk_measure(const char *path, double seconds) {
    /* as much room as a stream has: large pages take reads faster */
    enum { PIECE = 1 << 21, LEAST = 1 << 26, SLOTS = 32 };
    os_file *file;
    dg_error error;
    if (os_file_open(path, NULL, &file, &error) != DG_OK) return 0.0;
    const int64_t pieces = os_file_bytes(file) / PIECE;
    char *to = os_reserve(SLOTS * PIECE);
    if (to) os_large_pages(to, SLOTS * PIECE);
    double best = 0.0, all = 0.0; /* of stretches of a quarter second: others may use the disk too */
    for (int64_t i = pieces / 2; to && pieces >= LEAST / PIECE && all < seconds;) {
        const uint64_t began = os_nanoseconds();
        double done = 0.0, took = 0.0;
        for (; took < 0.25; i++) {
            const int64_t got = os_file_read(file, to + i % SLOTS * PIECE, PIECE, i % pieces * PIECE);
            if (got <= 0) break;
            done += (double)got;
            took = 1e-9 * (double)(os_nanoseconds() - began);
        }
        if (took < 0.25) break;
        if (done / took > best) best = done / took;
        all += took;
    }
    os_release(to, SLOTS * PIECE);
    os_file_close(file);
    return best;
}

/* ---- Chains ---- */

#if defined(__x86_64__)
#undef OPAQUE
#define OPAQUE(x) __asm__ volatile("" : "+x"(x))
#define FOR12(do) \
    do (0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

/* Eight products of unsigned and signed bytes summed in int16 per widening to int32: how 4-bit weights are
 * multiplied. */
__attribute__((target("avx2"))) static double chain_maddubs(void *arg, int64_t item) {
    (void)arg;
    __m256i w[4], x = _mm256_set1_epi8((char)(item & 3)), ones = _mm256_set1_epi16(1), total[4];
    for (int i = 0; i < 4; i++) w[i] = _mm256_set1_epi8((char)(i + 1)), total[i] = _mm256_setzero_si256();
    for (int64_t r = 0; r < ROUNDS; r++)
        for (int i = 0; i < 4; i++) {
            __m256i sum = _mm256_maddubs_epi16(w[i], x);
            for (int k = 1; k < 8; k++) {
                OPAQUE(x); /* as if another: each product is computed */
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], x));
            }
            total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(sum, ones));
        }
    for (int i = 0; i < 4; i++) OPAQUE(total[i]);
    return 4.0 * 8 * 32 * 2 * ROUNDS;
}

/* vpdpbusd: products of bytes straight into int32. */
__attribute__((target("avx512f,avx512vnni"))) static double chain_dpbusd(void *arg, int64_t item) {
    (void)arg;
    __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8((char)(item & 3));
#define DO(i) __m512i sum##i = _mm512_set1_epi32(i);
    FOR12(DO)
#undef DO
    for (int64_t r = 0; r < ROUNDS; r++) {
#define DO(i)                                   \
    sum##i = _mm512_dpbusd_epi32(sum##i, w, x); \
    __asm__ volatile("" : "+v"(sum##i));
        FOR12(DO)
#undef DO
    }
    return 12.0 * 64 * 2 * ROUNDS;
}

__attribute__((target("avx2,fma"))) static double chain_fma(void *arg, int64_t item) {
    (void)arg;
    __m256 w = _mm256_set1_ps(0.5f), x = _mm256_set1_ps((float)(item & 3));
#define DO(i) __m256 sum##i = _mm256_set1_ps(i);
    FOR12(DO)
#undef DO
    for (int64_t r = 0; r < ROUNDS; r++) {
#define DO(i)                               \
    sum##i = _mm256_fmadd_ps(sum##i, w, x); \
    OPAQUE(sum##i);
        FOR12(DO)
#undef DO
    }
    return 12.0 * 8 * 2 * ROUNDS;
}

__attribute__((target("avx512f"))) static double chain_fma512(void *arg, int64_t item) {
    (void)arg;
    __m512 w = _mm512_set1_ps(0.5f), x = _mm512_set1_ps((float)(item & 3));
#define DO(i) __m512 sum##i = _mm512_set1_ps(i);
    FOR12(DO)
#undef DO
    for (int64_t r = 0; r < ROUNDS; r++) {
#define DO(i)                               \
    sum##i = _mm512_fmadd_ps(sum##i, w, x); \
    __asm__ volatile("" : "+v"(sum##i));
        FOR12(DO)
#undef DO
    }
    return 12.0 * 16 * 2 * ROUNDS;
}

static bool has_avx2(void) { return __builtin_cpu_supports("avx2"); }
static bool has_fma(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
static bool has_vnni(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }
#endif

static bool always(void) { return true; }

static const struct {
    const char *kind, *instructions;
    bool (*exists)(void);
    double (*work)(void *arg, int64_t item); /* does one item's work and returns how much it was */
} peaks[] = {
#if defined(__x86_64__)
    {.kind = "int8", .instructions = "avx2 maddubs", .exists = has_avx2, .work = chain_maddubs},
    {.kind = "int8", .instructions = "avx512 dpbusd", .exists = has_vnni, .work = chain_dpbusd},
    {.kind = "float32", .instructions = "avx2 fma", .exists = has_fma, .work = chain_fma},
    {.kind = "float32", .instructions = "avx512 fma", .exists = has_avx512, .work = chain_fma512},
#endif
    {.kind = "memory", .instructions = "read", .exists = always, .work = read_memory},
};
enum { PEAKS = sizeof peaks / sizeof *peaks };

typedef struct measuring {
    double (*work)(void *arg, int64_t item);
    void *arg;
    double *done; /* [items] */
} measuring;

static void measure_item(void *arg, int64_t item, int32_t thread) {
    const measuring *a = arg;
    (void)thread;
    a->done[item] = a->work(a->arg, item);
}

/* Per second, the best of some runs on this pool. */
static double rate(pool *p, const measuring *a, int64_t items) {
    double best = 0.0;
    for (int r = 0; r < REPEATS; r++) {
        const uint64_t began = os_nanoseconds();
        pool_run(p, measure_item, (void *)(uintptr_t)a, items);
        const double seconds = 1e-9 * (double)(os_nanoseconds() - began);
        double work = 0.0;
        for (int64_t i = 0; i < items; i++) work += a->done[i];
        if (work / seconds > best) best = work / seconds;
    }
    return best;
}

bool dg_peak_measure(int32_t i, int32_t threads, dg_peak *out) {
    int32_t at = 0;
    for (; at < PEAKS; at++)
        if (peaks[at].exists() && i-- == 0) break;
    if (at == PEAKS) return false;
    if (threads < 1) threads = os_processors();
    *out = (dg_peak){.kind = peaks[at].kind, .instructions = peaks[at].instructions};
    const bool memory = peaks[at].work == read_memory;
    const size_t bytes = memory ? (size_t)STRETCHES * STRETCH : 1;
    const int64_t most = memory ? STRETCHES : (int64_t)ITEMS * threads;
    char *buffer = os_reserve(bytes);
    measuring a = {.work = peaks[at].work, .arg = buffer, .done = calloc((size_t)most, sizeof(double))};
    pool *one = pool_new(1), *all = pool_new(threads);
    if (buffer && a.done && one && all) {
        if (memory)
            for (size_t k = 0; k < bytes; k += 4096) buffer[k] = 1; /* pages never written are all the same one */
        out->one = rate(one, &a, memory ? most : ITEMS);
        out->all = rate(all, &a, most);
    }
    pool_free(one);
    pool_free(all);
    free(a.done);
    os_release(buffer, bytes);
    return true;
}
