/* Attention against the reference: head sizes with tensor cores and without, windows, causal and not, any number of
 * keys. */
#include "harness.h"

struct shape_of {
    int64_t n, n_head, n_kv, dim, past;
    bool causal;
    int64_t window;
};

static void compare(const both &b, const shape_of &s) {
    const int64_t count = s.past + s.n, row = s.n_kv * s.dim;
    paired<float> q(b, random_floats(s.n * s.n_head * s.dim, 1.0f)), y(b, static_cast<size_t>(s.n * s.n_head * s.dim));
    paired<float> k(b, random_floats(count * row, 4.0f / sqrtf(static_cast<float>(s.dim)))),
        v(b, random_floats(count * row, 1.0f));
    /* behind the last key lies what no query may see */
    const size_t bytes = static_cast<size_t>((count + 3) * row * b.gpu->key_bytes);
    paired<uint8_t> cache_k(b, std::vector<uint8_t>(bytes, 0x7B)),
        cache_v(b, std::vector<uint8_t>(bytes, 0x7B)); /* binary16: 61280 */
    b.gpu->store(b.gpu, cache_k.device, 0, k.device, count, row);
    b.gpu->store(b.gpu, cache_v.device, 0, v.device, count, row);
    attention_keys keys = {k.data(), v.data(), s.n_kv, s.past, count, s.causal, s.window};
    b.plain->attention(b.plain, y.data(), q.data(), &keys, s.n, s.n_head, s.dim);
    keys.k = cache_k.device;
    keys.v = cache_v.device;
    b.gpu->attention(b.gpu, y.device, q.device, &keys, s.n, s.n_head, s.dim);
    /* exact: a score is a float32 sum of dim terms that reaches about 4, so it is off by some 4 sqrt(dim) 2^-24, and a
     * share by as large a part; binary16: scores of rounded numbers, 4 * 2^-11 */
    const double error = error_between(y.fetch(), y.host),
                 tolerance = gpu_of(b.gpu)->exact ? 4.0 * sqrt(static_cast<double>(s.dim)) / 16777216.0 + 1e-6 : 4e-3;
    CHECK(error <= tolerance, "%d queries, %d heads over %d of %d, %d keys before, %s, window %d: off by %g",
          static_cast<int>(s.n), static_cast<int>(s.n_head), static_cast<int>(s.n_kv), static_cast<int>(s.dim),
          static_cast<int>(s.past), s.causal ? "causal" : "both ways", static_cast<int>(s.window), error);
}

static const char *variant = "plain";

static void test(uint64_t seed) {
    random_state = 1 + seed;
    const shape_of shapes[] = {
        {5, 4, 2, 64, 0, true, 0},      {20, 4, 2, 64, 70, false, 0}, {17, 4, 4, 64, 200, false, 33},
        {9, 6, 3, 64, 150, true, 64},   {1, 1, 1, 64, 0, false, 0},   {12, 4, 1, 128, 30, true, 7},
        {4, 4, 2, 256, 60, false, 50},  {3, 8, 2, 512, 40, false, 0}, {3, 6, 2, 512, 5, true, 4},
        {7, 4, 2, 32, 140, false, 100}, {5, 3, 3, 18, 20, true, 6},   {2, 2, 1, 48, 300, false, 0},
    };
    for (bool exact : {false, true}) {
        const both b(exact);
        for (const shape_of &s : shapes) compare(b, s);
        if (strcmp(variant, "plain") == 0 && seed == 0) compare(b, {40, 4, 2, 256, 300, false, 256});
    }
}

int main(int argc, char **argv) {
    if (argc > 1) variant = argv[1];
    return run_seeds("cuda attention", argc, argv, test);
}
