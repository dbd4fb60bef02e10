/* Every op: the fast table against the plain reference over odd shapes, and the same bits for any number of threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "material.h"
#include "ops.h"

/* Runs `call` (which writes n floats to y) with the reference, and with the fast table on 1, 2 and 3 threads. */
static ops *plain, *fast[3];
#define COMPARE(what, n, tolerance, call)                                                                           \
    do {                                                                                                            \
        float *want = calloc((size_t)(n), sizeof *want), *got = calloc((size_t)(n), sizeof *got);                   \
        float *first = calloc((size_t)(n), sizeof *first);                                                          \
        {                                                                                                           \
            const ops *o = plain;                                                                                   \
            float *y = want;                                                                                        \
            call;                                                                                                   \
        }                                                                                                           \
        for (int t = 0; t < 3; t++) {                                                                               \
            memset(got, 0x7f, (size_t)(n) * sizeof *got);                                                           \
            {                                                                                                       \
                const ops *o = fast[t];                                                                             \
                float *y = got;                                                                                     \
                call;                                                                                               \
            }                                                                                                       \
            if (t == 0) memcpy(first, got, (size_t)(n) * sizeof *got);                                              \
            CHECK(error_of(got, want, n) <= (tolerance), "%s differs from the reference by %g", what,               \
                  error_of(got, want, n));                                                                          \
            CHECK(memcmp(got, first, (size_t)(n) * sizeof *got) == 0, "%s: other bits with %d threads than with 1", \
                  what, t + 1);                                                                                     \
        }                                                                                                           \
        free(want), free(got), free(first);                                                                         \
    } while (0)

static void test_matmul(void) {
    const int64_t shapes[][3] = {{1, 32, 1}, {3, 64, 5}, {7, 96, 33}, {50, 1408 + 32, 19}, {4, 256, 64}, {5, 512, 9}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t n = shapes[s][0], cols = shapes[s][1], rows = shapes[s][2];
        float *x = numbers(n * cols, 1.0f);
        void *work = malloc(matmul_work(n, cols));
        for (int32_t i = 0; i < dg_format_count(); i++) {
            const dg_format *f = dg_format_at(i);
            if (!f->encode || cols % f->block) continue;
            const tensor w = weights(f->id, cols, rows, 1);
            COMPARE(f->name, n * rows, 2e-6, o->matmul(o, y, x, &w, n, work));
            free((void *)(uintptr_t)w.data);
        }
        free(x), free(work);
    }
    const tensor odd = weights(DG_F32, 13, 6, 1); /* rows of no whole number of vectors */
    float *x = numbers(13 * 4, 1.0f);
    void *work = malloc(matmul_work(4, 13));
    COMPARE("matmul of 13 columns", 24, 2e-6, o->matmul(o, y, x, &odd, 4, work));
    free(x), free(work);
    free((void *)(uintptr_t)odd.data);
}

static void test_rows_and_elements(void) {
    enum { N = 5, D = 37 };
    float *x = numbers(N * D, 2.0f), *w = numbers(D, 1.0f), *other = numbers(N * D, 3.0f);
    COMPARE("rms_norm", N * D, 1e-6, o->rms_norm(o, y, x, w, N, D, 1e-6f));
    COMPARE("rms_norm without weight", N * D, 1e-6, o->rms_norm(o, y, x, NULL, N, D, 1e-6f));
    COMPARE("add", N * D, 0.0, o->add(o, y, x, other, N, D, 0.7f));
    COMPARE("mul", N * D, 0.0, o->mul(o, y, x, w, N, D, 0.7f));
    COMPARE("gelu_mul", N * D, 1e-6, o->gelu_mul(o, y, x, other, N * D));
    COMPARE("divide", N * D, 0.0, o->divide(o, y, x, N * D, 0.6f));
    for (float cap = 0.1f; cap < 100.0f; cap *= 10.0f)
        COMPARE("softcap", N * D, 5e-7, (memcpy(y, x, sizeof(float) * N * D), o->softcap(o, y, N * D, cap)));
    float frequencies[6] = {1.0f, 0.5f, 0.1f, 0.01f, 0.0f, 0.0f};
    float angles[40], turned[40]; /* rope turns (1, 0): cosines and sines of what float32 makes of the angle */
    for (int i = 0; i < 20; i++) angles[i] = powf(0.5f, (float)i * 0.5f);
    for (int64_t at = 1; at < 1 << 18; at = at * 3 + 1)
        for (int t = 0; t < 3; t += 2) {
            for (int i = 0; i < 20; i++) turned[i] = 1.0f, turned[20 + i] = 0.0f;
            fast[t]->rope(fast[t], turned, 1, 1, 40, at, angles);
            for (int i = 0; i < 20; i++) {
                const double angle = (double)((float)at * angles[i]);
                CHECK(fabs((double)turned[i] - cos(angle)) < 1.5e-7 &&
                          fabs((double)turned[20 + i] - sin(angle)) < 1.5e-7,
                      "rope by %g: %g %g", angle, (double)turned[i], (double)turned[20 + i]);
            }
        }
    COMPARE("rope", N * 36, 1e-6, (memcpy(y, x, sizeof(float) * N * 36), o->rope(o, y, N, 3, 12, 1000, frequencies)));
    const tensor table = weights(DG_Q8_0, 64, 11, 1);
    const int32_t ids[] = {10, 0, 3, 3};
    COMPARE("embed", 4 * 64, 0.0, o->embed(o, y, &table, ids, 4, 8.0f));
    free(x), free(w), free(other), free((void *)(uintptr_t)table.data);
}

static void test_attention(void) {
    const struct {
        int64_t n, heads, kv, dim, past;
        bool causal;
        int64_t window;
    } cases[] = {
        {1, 1, 1, 8, 0, true, 0},      {5, 4, 2, 32, 0, true, 0},     {7, 4, 1, 64, 130, true, 16},
        {9, 2, 2, 12, 70, false, 0},   {6, 4, 2, 32, 200, false, 65}, {3, 2, 1, 256, 63, true, 64},
        {4, 2, 1, 20, 3, false, 1},    {3, 5, 2, 14, 90, true, 70},   {67, 6, 2, 34, 150, true, 100},
        {40, 8, 1, 256, 40, false, 0}, {70, 2, 1, 130, 0, true, 0},
    };
    for (size_t s = 0; s < sizeof cases / sizeof *cases; s++) {
        const int64_t n = cases[s].n, heads = cases[s].heads, kv = cases[s].kv, dim = cases[s].dim,
                      count = cases[s].past + n;
        float *q = numbers(n * heads * dim, 1.0f), *k = numbers(count * kv * dim, 1.0f),
              *v = numbers(count * kv * dim, 1.0f);
        const attention_keys keys = {k, v, kv, cases[s].past, count, cases[s].causal, cases[s].window};
        COMPARE("attention", n * heads * dim, 4e-6, o->attention(o, y, q, &keys, n, heads, dim));
        if (cases[s].causal) { /* one query at a time: the same bits as all at once */
            float *all = numbers(n * heads * dim, 0.0f), *one = numbers(n * heads * dim, 0.0f);
            fast[0]->attention(fast[0], all, q, &keys, n, heads, dim);
            for (int64_t i = 0; i < n; i++) {
                const attention_keys single = {
                    k, v, kv, cases[s].past + i, cases[s].past + i + 1, true, cases[s].window};
                fast[0]->attention(fast[0], one + i * heads * dim, q + i * heads * dim, &single, 1, heads, dim);
            }
            CHECK(memcmp(all, one, sizeof(float) * (size_t)(n * heads * dim)) == 0,
                  "attention of case %zu depends on its neighbours", s);
            free(all), free(one);
        }
        free(q), free(k), free(v);
    }
}

static void test_experts(void) {
    enum { N = 60, D = 64, H = 36, E = 5, K = 2 };
    float *x = numbers(N * D, 1.0f), *logits = numbers(N * E, 1.0f), scale[E] = {1.0f, 0.5f, 2.0f, 1.0f, 1.5f};
    for (int i = 0; i < E; i++) logits[3 * E + i] = 1.0f; /* a tie: the lower index first */
    int32_t *experts = malloc(sizeof *experts * N * K);
    float *shares = numbers(N * K, 1.0f);
    COMPARE("route", N * K, 1e-6, o->route(o, experts, y, logits, scale, N, E, K));
    plain->route(plain, experts, shares, logits, scale, N, E, K);
    CHECK(experts[3 * K] == 0 && experts[3 * K + 1] == 1, "a tie went to experts %d and %d", experts[3 * K],
          experts[3 * K + 1]);
    CHECK(fabsf(shares[3 * K] - 0.5f) < 1e-6f && fabsf(shares[3 * K + 1] - 0.25f) < 1e-6f, "shares of a tie: %g %g",
          (double)shares[3 * K], (double)shares[3 * K + 1]);
    for (int i = 0; i < N; i++)
        experts[i * K] = i % 3 ? 1 : 4, experts[i * K + 1] = 2; /* uneven: one expert has all, some none */
    const tensor fused = weights(DG_Q8_0, D, 2 * H, E), down = weights(DG_F32, H, D, E);
    tensor gate = fused, up = fused;
    gate.rows = up.rows = H;
    up.data += H * up.row_bytes;
    void *work = malloc(experts_work(N, K, D, H, E));
    COMPARE("experts", N * D, 3e-6, o->experts(o, y, x, &gate, &up, &down, experts, shares, N, K, NULL, work));
    free(x), free(logits), free(experts), free(shares), free(work);
    free((void *)(uintptr_t)fused.data), free((void *)(uintptr_t)down.data);
}

static void test_vocabulary(void) {
    const int64_t sizes[] = {1, 7, 64, 1000, 2051};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        enum { N = 6 };
        const int64_t v = sizes[s];
        float *z = numbers(N * v, 8.0f), *work = malloc(sizeof *work * (size_t)(N * v));
        for (int64_t i = 0; i < v; i++) z[i] = 0.25f, z[v + i] = i == v / 2 ? 300.0f : -300.0f; /* all equal; certain */
        double u[N];
        for (int i = 0; i < N; i++) u[i] = uniform();
        const tensor table = weights(DG_F32, 48, v, 1);
        COMPARE("condition", N * 48, 2e-6, o->self_condition_dense(o, y, z, &table, N, 7.0f, work));
        dg_choice want[N], got[N];
        plain->choose(plain, want, z, N, v, u);
        fast[2]->choose(fast[2], got, z, N, v, u);
        for (int i = 0; i < N; i++) {
            CHECK(got[i].argmax == want[i].argmax, "argmax %d, the reference has %d", got[i].argmax, want[i].argmax);
            CHECK(got[i].sample == want[i].sample, "sample %d of %d, the reference has %d", got[i].sample, (int)v,
                  want[i].sample);
            CHECK(fabsf(got[i].entropy - want[i].entropy) <= 2e-6f * (1.0f + want[i].entropy),
                  "entropy %g, the reference has %g", (double)got[i].entropy, (double)want[i].entropy);
        }
        CHECK(want[0].argmax == 0 && fabs((double)want[0].entropy - log((double)v)) < 1e-6,
              "equal logits: the lowest id, entropy log %d", (int)v);
        CHECK(want[1].argmax == v / 2 && want[1].sample == v / 2 && want[1].entropy == 0.0f, "a certain row");
        free(z), free(work), free((void *)(uintptr_t)table.data);
    }
}

/* One bad number at any place is found, none is not; and it goes through every op that later ones would trust. */
static void test_watch(void) {
    const float odd[] = {NAN, -NAN, INFINITY, -INFINITY};
    const int64_t sizes[] = {1, 7, 40, 4097, 70000};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const int64_t n = sizes[s];
        float *x = numbers(n, 1e38f);
        for (int64_t i = 0; i < 16; i++) {
            const int64_t at = i * (n - 1) / 15;
            int32_t found = 0;
            fast[i % 3]->check_finite(fast[i % 3], &found, x, n, 7);
            CHECK(found == 0, "%lld finite numbers", (long long)n);
            const float was = x[at];
            x[at] = odd[i % 4];
            fast[i % 3]->check_finite(fast[i % 3], &found, x, n, 7);
            CHECK(found == 7, "%g at %lld of %lld", (double)x[at], (long long)at, (long long)n);
            fast[i % 3]->check_finite(fast[i % 3], &found, x, n, 8);
            CHECK(found == 7, "the first mark stays");
            float *y = malloc((size_t)n * sizeof *y);
            memcpy(y, x, (size_t)n * sizeof *y);
            fast[i % 3]->softcap(fast[i % 3], y, n, 30.0f);
            CHECK(isnan(y[at]), "softcap makes %g of %g", (double)y[at], (double)x[at]);
            const double u = 0.5;
            dg_choice choice;
            fast[i % 3]->choose(fast[i % 3], &choice, x, 1, n, &u);
            CHECK(isnan(choice.entropy) && choice.argmax == -1 && choice.sample == -1,
                  "%g at %lld of %lld is chosen from", (double)x[at], (long long)at, (long long)n);
            x[at] = was;
            free(y);
        }
        free(x);
    }
}

static void test_backend(const char *backend, const dg_config *config) {
    dg_error error;
    random_state = 1; /* the same numbers for all */
    for (int t = 0; t < 3; t++)
        CHECK(ops_new(&(dg_model_options){.backend = backend, .threads = t + 1, .exact = true}, config, &fast[t],
                      &error) == DG_OK,
              "%s", error.message);
    test_matmul();
    test_rows_and_elements();
    test_attention();
    test_experts();
    test_vocabulary();
    test_watch();
    printf("ops: reference against %s\n", fast[0]->name);
    for (int t = 0; t < 3; t++) ops_free(fast[t]);
}

int main(void) {
    static const dg_config config = {.d_model = 2048,
                                     .d_ffn = 64,
                                     .d_expert = 64,
                                     .n_layer = 1,
                                     .n_head = 4,
                                     .head_dim = 256,
                                     .head_dim_swa = 64,
                                     .n_head_kv = {1}};
    dg_error error;
    ops *none;
    if (ops_new(&(dg_model_options){.backend = "reference", .threads = 1, .exact = true}, &config, &plain, &error) !=
        DG_OK)
        return 1;
    CHECK(ops_new(&(dg_model_options){.backend = "abacus", .threads = 1, .exact = true}, &config, &none, &error) ==
                  DG_ERROR_BACKEND &&
              strstr(error.message, "abacus"),
          "an unknown backend is named");
    for (int32_t i = 0; dg_backend_name(i); i++) {
        CHECK(strstr(error.message, dg_backend_name(i)), "%s is not among those offered: %s", dg_backend_name(i),
              error.message);
        test_backend(dg_backend_name(i), &config);
    }
    ops_free(plain);
    return check_done("ops");
}
