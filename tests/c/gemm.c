/* Integer products of every instruction set against the plain reference. Where activations lie on the grid they are
 * rounded to, nothing is lost and the two agree to float32 rounding; elsewhere they agree as well as 8 or 13 bits do. */
#include <string.h>

#include "check.h"
#include "ops.h"
#include "material.h"

static const dg_config config = {.d_model = 2816, .d_ffn = 704, .d_expert = 704, .n_layer = 1, .n_head = 4, .head_dim = 256, .head_dim_swa = 64, .n_head_kv = {1}};
static ops *plain;

static const int32_t formats[] = {DG_Q4_K, DG_Q5_K, DG_Q6_K, DG_Q8_0, DG_Q5_0, DG_Q5_1, DG_Q4_0, DG_IQ4_NL, DG_IQ4_XS, DG_BF16};
enum { FORMATS = sizeof formats / sizeof *formats };

/* Whole numbers up to 127, which every stretch of 32 columns reaches. */
static float *on_grid(int64_t n, int64_t cols) {
    float *x = numbers(n * cols, 1.0f);
    for (int64_t i = 0; i < n * cols; i++) x[i] = i % 32 == 5 ? -127.0f : roundf(60.0f * x[i]);
    return x;
}

static void test_matmul(const ops *o) {
    const int64_t shapes[][3] = {{1, 256, 16}, {3, 512, 7}, {5, 768, 37}, {13, 704, 33}, {2, 96, 5}, {70, 2816, 18}, {8, 2112, 40}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t n = shapes[s][0], cols = shapes[s][1], rows = shapes[s][2];
        float *x = on_grid(n, cols), *any = numbers(n * cols, 1.0f), *want = numbers(n * rows, 0.0f), *got = numbers(n * rows, 0.0f);
        void *work = malloc(matmul_work(n, cols));
        for (int f = 0; f < FORMATS; f++) {
            if (cols % dg_format_find(formats[f])->block) continue;
            const tensor w = weights(formats[f], cols, rows, 1);
            plain->matmul(plain, want, x, &w, n, work);
            o->matmul(o, got, x, &w, n, work);
            CHECK(error_of(got, want, n * rows) <= 1e-4, "%s: %s, %d x %d x %d, on the grid: off by %g", o->name, w.format->name, (int)n, (int)cols, (int)rows,
                  error_of(got, want, n * rows));
            plain->matmul(plain, want, any, &w, n, work);
            o->matmul(o, got, any, &w, n, work);
            CHECK(error_of(got, want, n * rows) <= 0.02, "%s: %s, %d x %d x %d: off by %g", o->name, w.format->name, (int)n, (int)cols, (int)rows,
                  error_of(got, want, n * rows));
            free((void *)(uintptr_t)w.data);
        }
        memset(x, 0, sizeof *x * (size_t)(n * cols)); /* nothing in, nothing out */
        const tensor w = weights(DG_Q8_0, cols, rows, 1);
        o->matmul(o, got, x, &w, n, work);
        for (int64_t i = 0; i < n * rows; i++) CHECK(got[i] == 0.0f, "%s: zeros gave %g", o->name, (double)got[i]);
        free(x), free(any), free(want), free(got), free(work), free((void *)(uintptr_t)w.data);
    }
}

/* A token's result must not depend on which others it is computed with. */
static void test_neighbours(const ops *o) {
    enum { N = 21, COLS = 512, ROWS = 35 };
    float *x = numbers(N * COLS, 1.0f), all[N * ROWS], one[ROWS];
    void *work = malloc(matmul_work(N, COLS));
    for (int f = 0; f < FORMATS; f++) {
        const tensor w = weights(formats[f], COLS, ROWS, 1);
        o->matmul(o, all, x, &w, N, work);
        for (int i = 0; i < N; i++) {
            o->matmul(o, one, x + i * COLS, &w, 1, work);
            CHECK(memcmp(one, all + i * ROWS, sizeof one) == 0, "%s: %s: row %d alone has other bits", o->name, w.format->name, i);
        }
        free((void *)(uintptr_t)w.data);
    }
    free(x), free(work);
}

static void test_experts(const ops *o) {
    enum { N = 40, D = 256, H = 96, E = 6, K = 2 };
    const int32_t pairs[][2] = {{DG_Q4_K, DG_Q5_0}, {DG_Q4_K, DG_Q8_0}, {DG_Q8_0, DG_Q8_0}, {DG_IQ4_XS, DG_IQ4_NL}, {DG_Q6_K, DG_BF16}};
    float *x = numbers(N * D, 1.0f), *shares = numbers(N * K, 0.5f), want[N * D], got[N * D];
    int32_t experts[N * K];
    for (int i = 0; i < N; i++) experts[2 * i] = i % 7 ? 1 : 4, experts[2 * i + 1] = 2 + i % 2 * 3; /* uneven; 0 has none */
    void *work = malloc(experts_work(N, K, D, H, E));
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++) {
        const tensor fused = weights(pairs[p][0], D, 2 * H, E), down = weights(pairs[p][1], H, D, E);
        tensor gate = fused, up = fused;
        gate.rows = up.rows = H;
        up.data += H * up.row_bytes;
        plain->experts(plain, want, x, &gate, &up, &down, experts, shares, N, K, work);
        o->experts(o, got, x, &gate, &up, &down, experts, shares, N, K, work);
        CHECK(error_of(got, want, N * D) <= 0.03, "%s: experts in %s and %s: off by %g", o->name, fused.format->name, down.format->name, error_of(got, want, N * D));
        free((void *)(uintptr_t)fused.data), free((void *)(uintptr_t)down.data);
    }
    free(x), free(shares), free(work);
}

/* The head over a vocabulary of several groups, on the grid, at temperatures that give certain and flat rows; then what
 * it leaves for self-conditioning, within the certificate. Twice, since the second step knows the first one's choice. */
static void test_head(const ops *o, int32_t format, float temperature) {
    enum { N = 19, D = 256, V = 5000 };
    const float cap = 30.0f, scale = 16.0f;
    dg_error error;
    soft exact, s;
    if (soft_new(N, V, D, &exact, &error) != DG_OK || soft_new(N, V, D, &s, &error) != DG_OK) exit(1);
    const tensor table = weights(format, D, V, 1);
    double u[N];
    float *x = on_grid(N, D), want[N * D], got[N * D], *room = numbers((int64_t)N * V, 0.0f);
    for (int i = 0; i < N * D; i++) x[i] *= 1.0f / 256.0f;
    memset(x, 0, sizeof *x * D); /* all logits equal */
    void *work = malloc(soften_work(N, D));
    for (int pass = 0; pass < 2; pass++) {
        dg_choice wanted[N], chosen[N];
        for (int i = 0; i < N; i++) u[i] = uniform();
        plain->head(plain, wanted, &exact, x, &table, N, cap, temperature, u, work);
        o->head(o, chosen, &s, x, &table, N, cap, temperature, u, work);
        for (int i = 0; i < N; i++) {
            CHECK(chosen[i].argmax == wanted[i].argmax, "%s: row %d: argmax %d, the reference has %d", o->name, i, chosen[i].argmax, wanted[i].argmax);
            CHECK(chosen[i].sample == wanted[i].sample, "%s: row %d: sample %d, the reference has %d", o->name, i, chosen[i].sample, wanted[i].sample);
            CHECK(fabsf(chosen[i].entropy - wanted[i].entropy) <= 2e-4f * (1.0f + wanted[i].entropy), "%s: row %d: entropy %g, the reference has %g", o->name, i,
                  (double)chosen[i].entropy, (double)wanted[i].entropy);
        }
        plain->soften(plain, want, &exact, &table, N, scale, work, room);
        o->soften(o, got, &s, &table, N, scale, work, room);
        for (int i = 0; i < N; i++) {
            double error_square = 0.0, square = 0.0;
            for (int j = 0; j < D; j++) {
                const double a = (double)got[i * D + j], b = (double)want[i * D + j];
                error_square += (a - b) * (a - b);
                square += b * b;
            }
            CHECK(sqrt(error_square) <= 1.2e-3 * sqrt(square), "%s: row %d at temperature %g: the conditioned embedding is off by %g", o->name, i,
                  (double)temperature, sqrt(error_square / square));
        }
        for (int i = 0; i < D; i++) x[3 * D + i] = -x[3 * D + i]; /* one row changes its mind */
    }
    free(x), free(room), free(work), free((void *)(uintptr_t)table.data);
    soft_free(&exact), soft_free(&s);
}

static void test_threads(const char *backend) {
    enum { N = 9, D = 256, V = 9000 };
    const tensor table = weights(DG_Q6_K, D, V, 1);
    float *x = numbers(N * D, 1.0f), first[N * D], y[N * D], *room = numbers((int64_t)N * V, 0.0f);
    double u[N];
    for (int i = 0; i < N; i++) u[i] = uniform();
    dg_choice want[N], got[N];
    void *work = malloc(soften_work(N, D));
    for (int t = 1; t <= 3; t++) {
        ops *o;
        soft s;
        dg_error error;
        if (ops_new(&(dg_model_options){backend, t, false}, &config, &o, &error) != DG_OK || soft_new(N, V, D, &s, &error) != DG_OK) exit(1);
        memset(got, 0, sizeof got);
        o->head(o, got, &s, x, &table, N, 30.0f, 0.1f, u, work);
        o->soften(o, y, &s, &table, N, 16.0f, work, room);
        if (t == 1) memcpy(want, got, sizeof got), memcpy(first, y, sizeof y);
        CHECK(memcmp(want, got, sizeof got) == 0 && memcmp(first, y, sizeof y) == 0, "%s: other bits with %d threads", backend, t);
        soft_free(&s);
        ops_free(o);
    }
    free(x), free(room), free(work), free((void *)(uintptr_t)table.data);
}

int main(void) {
    dg_error error;
    if (ops_new(&(dg_model_options){"reference", 1, true}, &config, &plain, &error) != DG_OK) return 1;
    for (int32_t b = 1; dg_backend_name(b); b++) { /* 0 is the best of those that follow */
        ops *o;
        if (ops_new(&(dg_model_options){dg_backend_name(b), 2, false}, &config, &o, &error) != DG_OK) return 1;
        if (o->gemm) {
            printf("gemm: %s\n", o->name);
            test_matmul(o);
            test_neighbours(o);
            test_experts(o);
            test_head(o, DG_Q6_K, 0.05f);
            test_head(o, DG_Q6_K, 0.8f);
            test_head(o, DG_Q8_0, 0.4f);
            test_head(o, DG_BF16, 0.4f);
            test_threads(dg_backend_name(b));
        }
        ops_free(o);
    }
    ops_free(plain);
    return check_done("gemm");
}
