/* Integer products of every instruction set against the plain reference. Where activations lie on the grid they are
 * rounded to, nothing is lost and the two agree to float32 rounding; elsewhere they agree as well as 8 or 13 bits do.
 */
#define _GNU_SOURCE /* mkstemp */
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "cpu/gemm.h"
#include "ops.h"
#include "material.h"

static const dg_config config = {.d_model = 2816,
                                 .d_ffn = 704,
                                 .d_expert = 704,
                                 .n_layer = 1,
                                 .n_head = 4,
                                 .head_dim = 256,
                                 .head_dim_swa = 64,
                                 .n_head_kv = {1}};
static ops *plain;

static const int32_t formats[] = {DG_Q4_K, DG_Q5_K, DG_Q6_K,   DG_Q8_0,   DG_Q5_0,
                                  DG_Q5_1, DG_Q4_0, DG_IQ4_NL, DG_IQ4_XS, DG_BF16};
enum { FORMATS = sizeof formats / sizeof *formats };

/* Whole numbers up to 127, which every stretch of 32 columns reaches. */
static float *on_grid(int64_t n, int64_t cols) {
    float *x = numbers(n * cols, 1.0f);
    for (int64_t i = 0; i < n * cols; i++) x[i] = i % 32 == 5 ? -127.0f : roundf(60.0f * x[i]);
    return x;
}

static void test_matmul(const ops *o) {
    const int64_t shapes[][3] = {{1, 256, 16}, {3, 512, 7},    {5, 768, 37}, {13, 704, 33},
                                 {2, 96, 5},   {70, 2816, 18}, {8, 2112, 40}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t n = shapes[s][0], cols = shapes[s][1], rows = shapes[s][2];
        float *x = on_grid(n, cols), *any = numbers(n * cols, 1.0f), *want = numbers(n * rows, 0.0f),
              *got = numbers(n * rows, 0.0f);
        void *work = malloc(matmul_work(n, cols));
        for (int f = 0; f < FORMATS; f++) {
            if (cols % dg_format_find(formats[f])->block) continue;
            const tensor w = weights(formats[f], cols, rows, 1);
            plain->matmul(plain, want, x, &w, n, work);
            o->matmul(o, got, x, &w, n, work);
            CHECK(error_of(got, want, n * rows) <= 1e-4, "%s: %s, %d x %d x %d, on the grid: off by %g", o->name,
                  w.format->name, (int)n, (int)cols, (int)rows, error_of(got, want, n * rows));
            plain->matmul(plain, want, any, &w, n, work);
            o->matmul(o, got, any, &w, n, work);
            CHECK(error_of(got, want, n * rows) <= 0.02, "%s: %s, %d x %d x %d: off by %g", o->name, w.format->name,
                  (int)n, (int)cols, (int)rows, error_of(got, want, n * rows));
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
            CHECK(memcmp(one, all + i * ROWS, sizeof one) == 0, "%s: %s: row %d alone has other bits", o->name,
                  w.format->name, i);
        }
        free((void *)(uintptr_t)w.data);
    }
    free(x), free(work);
}

static void test_experts(const ops *o) {
    enum { N = 40, D = 256, H = 96, E = 6, K = 2 };
    const int32_t pairs[][2] = {
        {DG_Q4_K, DG_Q5_0}, {DG_Q4_K, DG_Q8_0}, {DG_Q8_0, DG_Q8_0}, {DG_IQ4_XS, DG_IQ4_NL}, {DG_Q6_K, DG_BF16}};
    float *x = numbers(N * D, 1.0f), *shares = numbers(N * K, 0.5f), want[N * D], got[N * D];
    int32_t experts[N * K];
    for (int i = 0; i < N; i++)
        experts[2 * i] = i % 7 ? 1 : 4, experts[2 * i + 1] = 2 + i % 2 * 3; /* uneven; 0 has none */
    void *work = malloc(experts_work(N, K, D, H, E));
    for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++) {
        const tensor fused = weights(pairs[p][0], D, 2 * H, E), down = weights(pairs[p][1], H, D, E);
        tensor gate = fused, up = fused;
        gate.rows = up.rows = H;
        up.data += H * up.row_bytes;
        plain->experts(plain, want, x, &gate, &up, &down, experts, shares, N, K, NULL, work);
        o->experts(o, got, x, &gate, &up, &down, experts, shares, N, K, NULL, work);
        CHECK(error_of(got, want, N * D) <= 0.03, "%s: experts in %s and %s: off by %g", o->name, fused.format->name,
              down.format->name, error_of(got, want, N * D));
        free((void *)(uintptr_t)fused.data), free((void *)(uintptr_t)down.data);
    }
    free(x), free(shares), free(work);
}

static ops *new_ops(const char *backend, int32_t threads) {
    ops *o;
    dg_error error;
    if (ops_new(&(dg_model_options){.backend = backend, .threads = threads}, &config, &o, &error) != DG_OK) exit(1);
    return o;
}

/* Moves a tensor into the map of a file, where models have theirs. */
static void into_file(tensor *w, uint64_t *size) {
    char path[] = "/tmp/dgemma-test-gemm-XXXXXX";
    const int fd = mkstemp(path);
    dg_error error;
    const size_t bytes = (size_t)(w->experts * w->expert_bytes);
    if (fd < 0 || write(fd, w->data, bytes) != (ssize_t)bytes || close(fd) != 0) exit(1);
    free((void *)(uintptr_t)w->data);
    CHECK(os_map(path, &w->data, size, NULL, &error) == DG_OK, "%s", error.message);
    unlink(path);
}

/* Repacked matrices give the bits that mapped ones give: every format, whole and cut strips, every expert. */
static void test_repacked(const char *backend) {
    enum { N = 13, COLS = 768, E = 3, ROWS = 37, LARGE = 350 };
    ops *o = new_ops(backend, 3);
    layer layers[FORMATS + 1] = {0};
    float *x = numbers(N * COLS, 1.0f), want[N * LARGE], got[N * LARGE];
    void *work = malloc(matmul_work(N, COLS));
    int32_t n = 0;
    for (int f = 0; f < FORMATS; f++) {
        if (formats[f] == DG_BF16) continue; /* has no kernel */
        layers[n].ffn_gate_exps = weights(formats[f], COLS, ROWS, E);
        layers[n].ffn_up_exps = weights(formats[f], COLS, 5, E);
        layers[n++].ffn_down_exps = weights(formats[f], dg_format_find(formats[f])->block == 256 ? 256 : 704, 16, E);
    }
    uint64_t size;
    tensor *large = &layers[n].ffn_down_exps;
    layers[n].ffn_gate_exps = weights(DG_Q8_0, COLS, ROWS, E);
    layers[n++].ffn_up_exps = weights(DG_Q8_0, COLS, ROWS, E);
    *large = weights(DG_Q8_0, COLS, LARGE, E); /* several pages, which are let go and read again */
    into_file(large, &size);
    dg_error error;
    CHECK(ops_repack(o, layers, n, INT64_MAX, &error) == DG_OK, "%s", error.message);
    for (int32_t l = 0; l < n; l++) {
        const tensor *all[] = {&layers[l].ffn_gate_exps, &layers[l].ffn_up_exps, &layers[l].ffn_down_exps};
        for (int i = 0; i < 3; i++) {
            CHECK(all[i]->n_repacked == E, "%s: %d experts of %d repacked", all[i]->format->name,
                  (int)all[i]->n_repacked, E);
            for (int64_t e = 0; e < E; e++) {
                tensor mapped = *all[i], repacked = *all[i];
                mapped.data += e * mapped.expert_bytes;
                mapped.n_repacked = 0;
                repacked.data = NULL; /* not to be looked at */
                repacked.repacked += e * ((repacked.rows + 15) / 16 * 16) * repacked.row_bytes;
                o->matmul(o, want, x, &mapped, N, work);
                o->matmul(o, got, x, &repacked, N, work);
                CHECK(memcmp(want, got, sizeof *want * (size_t)(N * mapped.rows)) == 0,
                      "%s: %s of %d rows: other bits when repacked", o->name, mapped.format->name, (int)mapped.rows);
            }
            if (all[i] != large) free((void *)(uintptr_t)all[i]->data);
        }
    }
    os_unmap(large->data, size);
    free(x), free(work);
    ops_free(o);
}

/* The experts op when the memory holds all but one of the experts; and what is refused. */
static void test_repacked_experts(const char *backend) {
    enum { N = 40, D = 256, H = 96, E = 5, K = 2 };
    ops *o = new_ops(backend, 2);
    dg_error error;
    layer layers[2] = {{.ffn_gate_exps = weights(DG_Q4_K, D, H, E),
                        .ffn_up_exps = weights(DG_Q4_K, D, H, E),
                        .ffn_down_exps = weights(DG_Q5_0, H, D, E)}};
    const layer *l = &layers[0];
    layers[1] = *l;
    float *x = numbers(N * D, 1.0f), *shares = numbers(N * K, 0.5f), want[N * D], got[N * D];
    int32_t experts[N * K];
    for (int i = 0; i < N * K; i++) experts[i] = (i % K + i / 3) % E;
    void *work = malloc(experts_work(N, K, D, H, E));
    const int64_t one = 2 * l->ffn_gate_exps.expert_bytes + l->ffn_down_exps.expert_bytes; /* rows are whole strips */
    CHECK(ops_repack(o, layers, 2, one - 1, &error) == DG_ERROR_MEMORY && strstr(error.message, "one expert"),
          "too little memory: %s", error.message);
    CHECK(ops_repack(o, layers, 2, -1, &error) == DG_ERROR_USAGE && strstr(error.message, "-1"), "negative memory: %s",
          error.message);
    CHECK(ops_repack(plain, layers, 2, one, &error) == DG_ERROR_BACKEND && strstr(error.message, "not available"),
          "the reference repacks: %s", error.message);
    o->experts(o, want, x, &l->ffn_gate_exps, &l->ffn_up_exps, &l->ffn_down_exps, experts, shares, N, K, NULL, work);
    CHECK(ops_repack(o, layers, 2, E * one - 1, &error) == DG_OK, "%s", error.message);
    CHECK(l->ffn_gate_exps.n_repacked == E - 1 && l->ffn_down_exps.n_repacked == E - 1 &&
              layers[1].ffn_up_exps.n_repacked == 0,
          "%d of %d experts, %d of the next layer", (int)l->ffn_gate_exps.n_repacked, E,
          (int)layers[1].ffn_up_exps.n_repacked);
    o->experts(o, got, x, &l->ffn_gate_exps, &l->ffn_up_exps, &l->ffn_down_exps, experts, shares, N, K, NULL, work);
    CHECK(memcmp(want, got, sizeof want) == 0, "%s: experts have other bits when repacked", o->name);
    free(x), free(shares), free(work);
    free((void *)(uintptr_t)l->ffn_gate_exps.data), free((void *)(uintptr_t)l->ffn_up_exps.data),
        free((void *)(uintptr_t)l->ffn_down_exps.data);
    ops_free(o);
}

/* The head over a vocabulary of several groups, on the grid, at temperatures that give certain and flat rows; then what
 * it leaves for self-conditioning, within the certificate. Again, since a second step knows the first one's choice; and
 * with pins. */
static void test_head(const ops *o, int32_t format, float temperature) {
    enum { N = 19, D = 256, V = 5000 };
    const float cap = 30.0f, scale = 16.0f;
    self_cond exact = self_cond_new(N, V, D), s = self_cond_new(N, V, D);
    const tensor table = weights(format, D, V, 1);
    double u[N];
    float *x = on_grid(N, D), want[N * D], got[N * D], *scratch = numbers((int64_t)N * V, 0.0f);
    for (int i = 0; i < N * D; i++) x[i] *= 1.0f / 256.0f;
    memset(x, 0, sizeof *x * D); /* all logits equal */
    void *work = malloc(self_condition_work(N, D));
    const bool pinned[N] = {[0] = true, [5] = true, [N - 1] = true};
    const int32_t given[N] = {[0] = 4321, [N - 1] = 7};
    for (int pass = 0; pass < 4; pass++) {
        dg_choice wanted[N], chosen[N];
        if (pass == 2) exact.pinned = s.pinned = pinned;
        if (pass == 3) exact.given = s.given = given;
        for (int i = 0; i < N; i++) u[i] = uniform();
        const head_part sought = {N, &temperature, u, wanted, &exact};
        const head_part made = {N, &temperature, u, chosen, &s};
        plain->head(plain, &sought, 1, x, &table, N, cap, work);
        o->head(o, &made, 1, x, &table, N, cap, work);
        for (int i = 0; i < N; i++) {
            CHECK(chosen[i].argmax == wanted[i].argmax, "%s: row %d: argmax %d, the reference has %d", o->name, i,
                  chosen[i].argmax, wanted[i].argmax);
            CHECK(chosen[i].sample == wanted[i].sample, "%s: row %d: sample %d, the reference has %d", o->name, i,
                  chosen[i].sample, wanted[i].sample);
            CHECK(fabsf(chosen[i].entropy - wanted[i].entropy) <= 2e-4f * (1.0f + wanted[i].entropy),
                  "%s: row %d: entropy %g, the reference has %g", o->name, i, (double)chosen[i].entropy,
                  (double)wanted[i].entropy);
        }
        plain->self_condition(plain, want, &exact, &table, N, scale, work, scratch);
        o->self_condition(o, got, &s, &table, N, scale, work, scratch);
        for (int i = 0; i < N; i++) {
            double error_square = 0.0, square = 0.0;
            for (int j = 0; j < D; j++) {
                const double a = (double)got[i * D + j], b = (double)want[i * D + j];
                error_square += (a - b) * (a - b);
                square += b * b;
            }
            CHECK((square == 0.0) == (pass == 2 && pinned[i]),
                  "row %d: conditioning of squared length %g where pins have none", i, square);
            CHECK(sqrt(error_square) <= 1.2e-3 * sqrt(square),
                  "%s: row %d at temperature %g: the conditioned embedding is off by %g", o->name, i,
                  (double)temperature, sqrt(error_square / square));
        }
        for (int i = 0; i < D; i++) x[3 * D + i] = -x[3 * D + i]; /* one row changes its mind */
    }
    free(x), free(scratch), free(work), free((void *)(uintptr_t)table.data);
    self_cond_free(&exact), self_cond_free(&s);
}

static void test_threads(const char *backend) {
    enum { N = 9, D = 256, V = 9000 };
    const tensor table = weights(DG_Q6_K, D, V, 1);
    float *x = numbers(N * D, 1.0f), first[N * D], y[N * D], *scratch = numbers((int64_t)N * V, 0.0f);
    double u[N];
    for (int i = 0; i < N; i++) u[i] = uniform();
    dg_choice want[N], got[N];
    void *work = malloc(self_condition_work(N, D));
    for (int t = 1; t <= 3; t++) {
        ops *o = new_ops(backend, t);
        self_cond s = self_cond_new(N, V, D);
        const float temperature = 0.1f;
        memset(got, 0, sizeof got);
        o->head(o, &(head_part){N, &temperature, u, got, &s}, 1, x, &table, N, 30.0f, work);
        o->self_condition(o, y, &s, &table, N, 16.0f, work, scratch);
        if (t == 1) memcpy(want, got, sizeof got), memcpy(first, y, sizeof y);
        CHECK(memcmp(want, got, sizeof got) == 0 && memcmp(first, y, sizeof y) == 0, "%s: other bits with %d threads",
              backend, t);
        self_cond_free(&s);
        ops_free(o);
    }
    free(x), free(scratch), free(work), free((void *)(uintptr_t)table.data);
}

/* ThreadSanitizer looks for races, which what is computed does not change, and takes fifty times as long. */
#ifdef __SANITIZE_THREAD__
enum { RACES_ALONE = 1 };
#else
enum { RACES_ALONE = 0 };
#endif

int main(void) {
    plain = new_ops("reference", 1);
    for (int32_t b = 1; dg_backend_name(b); b++) { /* 0 is the best of those that follow */
        ops *o = new_ops(dg_backend_name(b), 2);
        if (o->gemm) {
            printf("gemm: %s\n", o->name);
            test_threads(dg_backend_name(b));
            test_experts(o);
            if (!RACES_ALONE) {
                test_matmul(o);
                test_neighbours(o);
                test_head(o, DG_Q6_K, 0.05f);
                test_head(o, DG_Q6_K, 0.8f);
                test_head(o, DG_Q8_0, 0.4f);
                test_head(o, DG_BF16, 0.4f);
            }
            if (!RACES_ALONE && o->gemm->kernels[0].repack) {
                test_repacked(dg_backend_name(b));
                test_repacked_experts(dg_backend_name(b));
            }
        }
        ops_free(o);
    }
    ops_free(plain);
    return check_done("gemm");
}
