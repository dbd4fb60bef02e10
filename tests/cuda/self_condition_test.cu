/* Self-conditioning over all of the vocabulary, of rows that need it or of all, against the reference. */
#include "harness.h"

/* The largest difference of all rows, as a part of the row's length. */
static double row_error(const std::vector<float> &got, const std::vector<float> &want, int64_t n) {
    const size_t cols = want.size() / static_cast<size_t>(n);
    double worst = 0.0;
    for (size_t i = 0; i < want.size(); i += cols) {
        double wrong = 0.0, length = 0.0;
        for (size_t j = i; j < i + cols; j++) {
            const double is = static_cast<double>(got[j]), should = static_cast<double>(want[j]);
            wrong += (is - should) * (is - should);
            length += should * should;
        }
        const double error = sqrt(wrong / length);
        worst = error <= worst ? worst : error == error ? error : INFINITY;
    }
    return worst;
}

/* Shares and table are rounded to binary16: a product is off by at most 2^-11 of itself for either. */
constexpr double HALVES = 0x1p-10, FLOATS = 1e-5;

/* Softmax of whole rows times the table: a flat row, one of a single word, one whose peak is its last word, one with no
 * share before the last stretch, or in a half, and random ones. size: by which a table of float32 is larger than
 * others; 0: it is of ones. */
static void test_condition(const both &b, int32_t format, int64_t n, int64_t cols, int64_t n_vocab, float spread,
                           float size, double most) {
    const weight table(b, format, cols, n_vocab, 1, [&](uint8_t *data) {
        for (int64_t i = 0; format == DG_F32 && i < n_vocab * cols; i++)
            reinterpret_cast<float *>(data)[i] = size > 0.0f ? reinterpret_cast<float *>(data)[i] * size : 1.0f;
    });
    std::vector<float> z = random_floats(n * n_vocab, spread);
    const int64_t without =
        n_vocab > SELF_COND_STRETCH ? n_vocab / SELF_COND_STRETCH * SELF_COND_STRETCH : n_vocab / 2 + 1;
    for (int64_t i = 0; i < n && i < 4; i++) {
        float *const row = z.data() + i * n_vocab;
        if (i == 1) row[n_vocab / 3] = 50.0f;
        if (i == 2) row[n_vocab - 1] = 2.0f * spread + 3.0f;
        for (int64_t v = 0; v < n_vocab; v++)
            if (i == 0) row[v] = -7.0f;
            else if (i == 3 && v < without) row[v] = -INFINITY;
    }
    paired<float> y(b, static_cast<size_t>(n * cols)),
        scratch(b, static_cast<size_t>(
                       n * ((n_vocab < SELF_COND_STRETCH ? n_vocab : static_cast<int64_t>(SELF_COND_STRETCH)) + 4)));
    b.plain->self_condition_dense(b.plain, y.data(), z.data(), &table.t, n, 8.0f, nullptr);
    b.gpu->self_condition_dense(b.gpu, y.device, z.data(), &table.t, n, 8.0f, scratch.device);
    const double error = row_error(y.fetch(), y.host, n);
    CHECK(error <= most, "%s, %d rows, %d columns, %d ids, size %g: conditioned, off by %g", table.t.format->name,
          static_cast<int>(n), static_cast<int>(cols), static_cast<int>(n_vocab), static_cast<double>(size), error);
}

/* NaN and infinity are seen: of a table in the columns that it reaches, even where its word has no share, of logits in
 * their row. */
static void test_odd_numbers(const both &b, int32_t format) {
    const int64_t n = 3, cols = 64, n_vocab = 70, word = 41, column = 32;
    for (float odd : {NAN, INFINITY, 0.0f}) {
        const weight table(b, format, cols, n_vocab, 1, [&](uint8_t *data) {
            uint8_t *const at = data + (word * cols + column) / dg_format_find(format)->block *
                                           dg_format_find(format)->bytes; /* a number, or a block's scale */
            const uint16_t narrow = format == DG_BF16 ? bf16_from_float(odd) : half_from_float(odd);
            if (odd == 0.0f) return;
            if (format == DG_F32) memcpy(at, &odd, sizeof odd);
            else memcpy(at, &narrow, sizeof narrow);
        });
        std::vector<float> z = random_floats(n * n_vocab, 1.0f);
        z[static_cast<size_t>(n_vocab + word)] = -90.0f;
        if (odd == 0.0f) z[static_cast<size_t>(2 * n_vocab + 5)] = NAN;
        paired<float> y(b, static_cast<size_t>(n * cols)), scratch(b, static_cast<size_t>(n * (n_vocab + 4)));
        b.gpu->self_condition_dense(b.gpu, y.device, z.data(), &table.t, n, 8.0f, scratch.device);
        const std::vector<float> got = y.fetch();
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < cols; j++) {
                const bool there = odd == 0.0f                          ? i == 2
                                   : dg_format_find(format)->block == 1 ? j == column
                                                                        : j >= column;
                CHECK(there != (fabsf(got[static_cast<size_t>(i * cols + j)]) < INFINITY),
                      "%s: %g in the %s, and row %d, column %d is %g", dg_format_find(format)->name,
                      static_cast<double>(odd), odd == 0.0f ? "logits" : "table", static_cast<int>(i),
                      static_cast<int>(j), static_cast<double>(got[static_cast<size_t>(i * cols + j)]));
            }
    }
}

/* Dense rows are the reference's, and the same bits whichever others are dense beside them, and however many rows there
 * are. */
static void test_dense() {
    const both b(false);
    b.gpu->tolerance = -1.0f; /* all rows are dense that are not pinned */
    const int64_t n = 130, n_vocab = 91, d = 132; /* lists are room for a second sum of each number */
    const float cap = 30.0f, scale = 8.0f;
    const weight table(b, DG_F32, d, n_vocab);
    paired<float> at(b, std::vector<float>{0.7f}), x(b, random_floats(n * d, 0.4f)), y(b, static_cast<size_t>(n * d));
    paired<double> u(b, std::vector<double>(static_cast<size_t>(n), 0.5));
    paired<dg_choice> choices(b, static_cast<size_t>(n));
    paired<uint8_t> work(b, matmul_work(n, d) + self_condition_work(n, d)), pinned(b, static_cast<size_t>(n));
    self_cond_pair all(b, n, n_vocab, d), one(b, 1, n_vocab, d);
    std::vector<float> wide(static_cast<size_t>(n * n_vocab));
    const head_part plain = {n, at.data(), u.data(), choices.data(), &all.plain},
                    gpu = {n, at.device, u.device, choices.device, &all.gpu};
    b.plain->head(b.plain, &plain, 1, x.data(), &table.t, n, cap, work.data());
    b.plain->self_condition(b.plain, y.data(), &all.plain, &table.t, n, scale, work.data(), wide.data());
    b.gpu->head(b.gpu, &gpu, 1, x.device, &table.t, n, cap, work.device);
    const auto soften = [&] {
        b.gpu->self_condition(b.gpu, y.device, &all.gpu, &table.t, n, scale, work.device, nullptr);
        return y.fetch();
    };
    const std::vector<float> got = soften();
    const double error = row_error(got, y.host, n);
    CHECK(error <= HALVES, "%d dense rows: off by %g", static_cast<int>(n), error);
    const auto same = [&](const std::vector<float> &others, int64_t i, int64_t j, const char *what) {
        CHECK(memcmp(&others[static_cast<size_t>(i * d)], &got[static_cast<size_t>(j * d)],
                     static_cast<size_t>(d) * sizeof(float)) == 0,
              "row %d is another %s", static_cast<int>(j), what);
    };
    all.gpu.pinned = reinterpret_cast<bool *>(pinned.device);
    for (int64_t every : {7, 1}) { /* those that are left; none is */
        for (int64_t i = 0; i < n; i++) pinned.host[static_cast<size_t>(i)] = every == 1 || i % every != 3;
        b.gpu->upload(b.gpu, pinned.device, pinned.data(), pinned.host.size());
        const std::vector<float> some = soften();
        for (int64_t i = 0; i < n; i++) {
            if (!pinned.host[static_cast<size_t>(i)]) same(some, i, i, "beside others");
            else
                CHECK(some[static_cast<size_t>(i * d)] == 0.0f, "row %d is conditioned on nothing",
                      static_cast<int>(i));
        }
    }
    const head_part alone = {1, at.device, u.device, choices.device, &one.gpu};
    for (int64_t i : {0, 129}) {
        b.gpu->head(b.gpu, &alone, 1, x.device + i * d, &table.t, 1, cap, work.device);
        b.gpu->self_condition(b.gpu, y.device, &one.gpu, &table.t, 1, scale, work.device, nullptr);
        same(y.fetch(), 0, i, "alone");
    }
}

static void test(uint64_t seed) {
    random_state = 1 + seed;
    const both b, rounding(false);
    test_condition(b, DG_Q8_0, 5, 32, 2 * SELF_COND_STRETCH + 77, 1.0f, 1.0f, FLOATS);
    for (int32_t format : {DG_F32, DG_F16, DG_BF16, DG_Q8_0, DG_Q6_K, DG_Q5_K, DG_Q5_1, DG_Q5_0, DG_Q4_K, DG_Q4_0,
                           DG_IQ4_NL, DG_IQ4_XS, DG_Q3_K, DG_Q2_K})
        test_condition(rounding, format, 17,
                       dg_format_find(format)->block == 1    ? 136
                       : dg_format_find(format)->block == 32 ? 160
                                                             : 256,
                       131, 2.0f, 1.0f, HALVES);
    test_condition(rounding, DG_F32, 1, 132, 40, 0.5f, 1.0f, HALVES);
    test_condition(rounding, DG_F32, 4, 30, 41, 0.5f, 1.0f, HALVES); /* columns that are no lines */
    test_condition(rounding, DG_Q8_0, 130, 160, 64, 1.0f, 1.0f, HALVES);
    test_condition(rounding, DG_Q8_0, 5, 32, 2 * SELF_COND_STRETCH + 77, 1.0f, 1.0f, HALVES);
    test_condition(rounding, DG_BF16, 4, 8, SELF_COND_STRETCH + 1, 8.0f, 1.0f, HALVES);
    test_condition(rounding, DG_F32, 5, 64, 100, 3.0f, 0.0f, FLOATS); /* shares sum to 1 */
    for (float size : {1e12f, 1e-12f})
        test_condition(rounding, DG_F32, 5, 64, 100, 3.0f, size, HALVES); /* what binary16 does not hold */
    for (int32_t format : {DG_F32, DG_BF16, DG_Q8_0})
        for (const both *either : {&b, &rounding}) test_odd_numbers(*either, format);
    test_dense();
}

int main(int argc, char **argv) { return run_seeds("cuda self-conditioning", argc, argv, test); }
