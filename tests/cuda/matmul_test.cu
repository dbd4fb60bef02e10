/* Matrix products and experts of every format, over odd shapes, against the reference: exactly, and as the fast kernels
 * round. */
#include "harness.h"

static const int32_t FORMATS[] = {
#define DG_FORMAT(NAME, id, stem, block, encodes) id,
#include "formats.def"
#undef DG_FORMAT
};

/* Of int8 activations against 8-bit blocks of 32: half a step of 1/127 of the block's peak per value, mostly averaged out. */
static double tolerance(bool exact) { return exact ? 2e-6 : 1.5e-2; }

static void test_matmul(const both &b, bool exact) {
    const int64_t shapes[][3] = {{1, 256, 9}, {3, 512, 17}, {16, 256, 64}, {33, 768, 70}}; /* n, cols, rows */
    for (int32_t format : FORMATS)
        for (const auto &s : shapes) {
            const int64_t n = s[0], cols = s[1], rows = s[2];
            const weight w(b, format, cols, rows);
            paired<float> x(b, random_floats(n * cols, 1.0f)), y(b, static_cast<size_t>(n * rows));
            paired<uint8_t> work(b, matmul_work(n, cols));
            b.plain->matmul(b.plain, y.data(), x.data(), &w.t, n, nullptr);
            b.gpu->matmul(b.gpu, y.device, x.device, &w.t, n, work.device);
            const double error = error_between(y.fetch(), y.host);
            CHECK(error <= tolerance(exact), "%s, %d x %d times %d: off by %g", w.t.format->name, static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(n), error);
        }
    /* rows that are not a whole number of large blocks */
    for (int32_t format : {DG_F32, DG_F16, DG_BF16, DG_Q8_0, DG_Q5_1, DG_Q5_0, DG_Q4_0, DG_IQ4_NL}) {
        const int64_t n = 5, cols = 96, rows = 33;
        const weight w(b, format, cols, rows);
        paired<float> x(b, random_floats(n * cols, 1.0f)), y(b, static_cast<size_t>(n * rows));
        paired<uint8_t> work(b, matmul_work(n, cols));
        b.plain->matmul(b.plain, y.data(), x.data(), &w.t, n, nullptr);
        b.gpu->matmul(b.gpu, y.device, x.device, &w.t, n, work.device);
        const double error = error_between(y.fetch(), y.host);
        CHECK(error <= tolerance(exact), "%s, rows of 96: off by %g", w.t.format->name, error);
    }
}

static void test_experts(const both &b, bool exact) {
    const struct { int32_t up, down; int64_t n, k, n_expert, d, d_expert; } cases[] = {
        {DG_Q4_K, DG_Q5_0, 24, 3, 5, 256, 96}, {DG_Q8_0, DG_Q8_0, 1, 1, 3, 64, 32}, {DG_BF16, DG_BF16, 40, 2, 2, 64, 48},
        {DG_F32, DG_F32, 9, 8, 16, 32, 24}, {DG_Q6_K, DG_Q8_0, 30, 4, 64, 256, 64}, {DG_Q4_0, DG_IQ4_NL, 17, 2, 4, 96, 64},
    };
    for (const auto &c : cases) {
        const weight gate(b, c.up, c.d, c.d_expert, c.n_expert), up(b, c.up, c.d, c.d_expert, c.n_expert), down(b, c.down, c.d_expert, c.d, c.n_expert);
        paired<float> x(b, random_floats(c.n * c.d, 1.0f)), y(b, static_cast<size_t>(c.n * c.d)), shares(b, random_floats(c.n * c.k, 0.5f));
        std::vector<int32_t> chosen;
        for (int64_t i = 0; i < c.n; i++) { /* skewed: low experts often, some never */
            std::vector<int32_t> row;
            while (static_cast<int64_t>(row.size()) < c.k) {
                const auto e = static_cast<int32_t>(static_cast<double>(c.n_expert) * (row.size() < static_cast<size_t>(c.k) / 2 ? uniform() * uniform() : uniform()));
                bool taken = false;
                for (int32_t r : row) taken |= r == e;
                if (!taken) row.push_back(e);
            }
            chosen.insert(chosen.end(), row.begin(), row.end());
        }
        paired<int32_t> experts(b, chosen);
        paired<uint8_t> work(b, experts_work(c.n, c.k, c.d, c.d_expert, c.n_expert));
        b.plain->experts(b.plain, y.data(), x.data(), &gate.t, &up.t, &down.t, experts.data(), shares.data(), c.n, c.k, work.data());
        b.gpu->experts(b.gpu, y.device, x.device, &gate.t, &up.t, &down.t, experts.device, shares.device, c.n, c.k, work.device);
        const double error = error_between(y.fetch(), y.host);
        CHECK(error <= (exact ? 5e-6 : 3e-2), "%s and %s, %d of %d experts for %d tokens: off by %g", gate.t.format->name, down.t.format->name, static_cast<int>(c.k),
              static_cast<int>(c.n_expert), static_cast<int>(c.n), error);
    }
}

static void test(uint64_t) {
    for (bool exact : {true, false}) {
        const both b(exact);
        random_state = 1;
        test_matmul(b, exact);
        test_experts(b, exact);
    }
}

int main(int argc, char **argv) { return run_seeds("cuda matmul", argc, argv, test); }
