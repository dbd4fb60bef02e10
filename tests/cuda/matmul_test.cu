/* Matrix products and experts of every format, over odd shapes, against the reference: exactly, and as the fast kernels
 * round. */
#include "harness.h"
#include "matmul.cuh"

static const int32_t FORMATS[] = {
#define DG_FORMAT(NAME, id, stem, block, encodes) id,
#include "formats.def"
#undef DG_FORMAT
};

/* The error of int8 activations against 8-bit blocks of 32: half a step of 1/127 of the block's peak per value, mostly
 * averaged out. */
static double tolerance(bool exact) { return exact ? 2e-6 : 2.5e-2; }

/* The formats whose products are made in int8; those with tiles, of activations rounded to something; and those with
 * one scale of the activations per 256 columns. */
static bool in_int8(int32_t format) {
    for (int32_t f : {DG_Q4_K, DG_Q5_K, DG_Q6_K, DG_Q8_0, DG_Q5_0, DG_Q5_1, DG_Q4_0, DG_IQ4_NL})
        if (f == format) return true;
    return false;
}
static bool tiled(const both &b, int32_t format, int64_t cols) {
    return in_int8(format) ||
           ((format == DG_BF16 || format == DG_F16) && cols % 8 == 0 && gpu_of(b.gpu)->architecture >= 80);
}
static bool k_quant(int32_t format) { return format == DG_Q4_K || format == DG_Q5_K || format == DG_Q6_K; }

/* What is left of rows of activations after rounding: then products are those of float32, but for the last bits. */
static std::vector<float> rounded(const std::vector<float> &x, int32_t format, size_t cols) {
    const size_t step = k_quant(format) ? 256 : in_int8(format) ? 32 : cols;
    std::vector<float> out(x.size());
    if (format == DG_BF16) {
        for (size_t i = 0; i < x.size(); i++) out[i] = bf16_to_float(bf16_from_float(x[i]));
        return out;
    }
    if (format == DG_F16) {
        for (size_t from = 0; from < x.size(); from += cols) {
            float peak = 0.0f;
            int power;
            for (size_t i = from; i < from + cols; i++) peak = fmaxf(peak, fabsf(x[i]));
            frexpf(peak, &power); /* binary16 of numbers below 2^8 */
            for (size_t i = from; i < from + cols; i++)
                out[i] = ldexpf(half_to_float(half_from_float(ldexpf(x[i], 8 - power))), power - 8);
        }
        return out;
    }
    for (size_t from = 0; from < x.size(); from += step) {
        float peak = 0.0f;
        for (size_t i = from; i < from + step; i++) peak = fmaxf(peak, fabsf(x[i]));
        for (size_t i = from; i < from + step; i++)
            out[i] = peak > 0.0f ? rintf(x[i] * (127.0f / peak)) * (peak / 127.0f) : 0.0f;
    }
    return out;
}

/* One product against the reference, and where it is made in int8, against the reference's of what is left after
 * rounding. */
static void check_matmul(const both &b, bool exact, int32_t format, int64_t n, int64_t cols, int64_t rows) {
    const weight w(b, format, cols, rows);
    paired<float> x(b, random_floats(n * cols, 1.0f)), y(b, static_cast<size_t>(n * rows));
    for (int64_t j = 0; j < cols; j++)
        x.host[static_cast<size_t>(n - 1) * static_cast<size_t>(cols) + static_cast<size_t>(j)] *=
            j % 256 < 32 ? 0.0f : 300.0f; /* a row of another size, with nothing in places */
    b.gpu->upload(b.gpu, x.device, x.data(), x.host.size() * sizeof(float));
    paired<uint8_t> work(b, matmul_work(n, cols));
    b.plain->matmul(b.plain, y.data(), x.data(), &w.t, n, nullptr);
    b.gpu->matmul(b.gpu, y.device, x.device, &w.t, n, work.device);
    const std::vector<float> got = y.fetch();
    for (int64_t i = 0; i < n;
         i++) { /* rows by themselves, since one is larger; of few numbers all may happen to be small */
        const auto from = static_cast<std::ptrdiff_t>(i * rows);
        const double error = error_between({got.begin() + from, got.begin() + from + rows},
                                           {y.host.begin() + from, y.host.begin() + from + rows});
        CHECK(rows < 16 || error <= tolerance(exact), "%s, %d x %d times %d, row %d: off by %g", w.t.format->name,
              static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(n), static_cast<int>(i), error);
    }
    if (exact || !tiled(b, format, cols)) return;
    const std::vector<float> left = rounded(x.host, format, static_cast<size_t>(cols));
    b.plain->matmul(b.plain, y.data(), left.data(), &w.t, n, nullptr);
    const double error = error_between(got, y.host);
    CHECK(rows < 16 || error <= 1e-5, "%s, %d x %d times %d, of rounded numbers: off by %g", w.t.format->name,
          static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(n), error);
}

static void test_matmul(const both &b, bool exact) {
    const int64_t shapes[][3] = {{1, 256, 1}, {3, 512, 17}, {16, 256, 64}, {33, 768, 70}}; /* n, cols, rows */
    for (int32_t format : FORMATS)
        for (const auto &s : shapes) check_matmul(b, exact, format, s[0], s[1], s[2]);
    check_matmul(b, exact, DG_BF16, 5, 100, 33);
    check_matmul(b, exact, DG_Q4_K, 65, 256, 130); /* several tiles both ways */
    /* rows that are not a whole number of large blocks, or of stages, or aligned */
    for (int32_t format : {DG_F32, DG_F16, DG_BF16, DG_Q8_0, DG_Q5_1, DG_Q5_0, DG_Q4_0, DG_IQ4_NL}) {
        check_matmul(b, exact, format, 5, 96, 33);
        if (!exact) check_matmul(b, exact, format, 20, 704, 67);
    }
}

/* The head draws from chunks that it computes again: they must be what they were. */
static void test_gathered(const both &b) {
    const int64_t n = 18, cols = 256, rows = 300;
    for (int32_t format : {DG_F32, DG_BF16, DG_Q8_0, DG_Q5_1, DG_Q4_K, DG_Q6_K}) {
        const weight w(b, format, cols, rows);
        paired<float> x(b, random_floats(n * cols, 1.0f)), y(b, static_cast<size_t>(n * rows)),
            z(b, static_cast<size_t>(n * SELF_COND_CHUNK));
        std::vector<int32_t> chosen;
        for (int64_t i = 0; i < n; i++) chosen.push_back(static_cast<int32_t>(i % 2));
        paired<int32_t> chunks(b, chosen);
        paired<uint8_t> work(b, matmul_work(n, cols));
        matmul_counted(launch(b.gpu, "all"), y.device, x.device, &w.t, n, nullptr, work.device);
        matmul_gathered(launch(b.gpu, "gathered"), z.device, x.device, &w.t, chunks.device, n, work.device);
        const std::vector<float> all = y.fetch(), some = z.fetch();
        int64_t differing = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t r = 0; r < SELF_COND_CHUNK && chosen[static_cast<size_t>(i)] * SELF_COND_CHUNK + r < rows; r++)
                differing +=
                    all[static_cast<size_t>(i * rows + chosen[static_cast<size_t>(i)] * SELF_COND_CHUNK + r)] !=
                    some[static_cast<size_t>(i * SELF_COND_CHUNK + r)];
        CHECK(differing == 0, "%s: %d gathered numbers differ", w.t.format->name, static_cast<int>(differing));
    }
}

/* The experts op, made of the reference's products, of numbers rounded where the backend rounds them. */
static std::vector<float> rounded_experts(const both &b, const std::vector<float> &x, const tensor &gate,
                                          const tensor &up, const tensor &down, const std::vector<int32_t> &experts,
                                          const std::vector<float> &shares, int64_t n, int64_t k) {
    const auto d = static_cast<size_t>(gate.cols), f = static_cast<size_t>(gate.rows);
    const std::vector<float> left = rounded(x, gate.format->id, d);
    std::vector<float> y(static_cast<size_t>(n) * d, 0.0f), one(f), other(f), out(d);
    for (size_t p = 0; p < static_cast<size_t>(n * k); p++) {
        const auto of = [&](const tensor &t) {
            tensor e = t;
            e.data = e.placed = t.data + experts[p] * t.expert_bytes;
            e.experts = 1;
            return e;
        };
        const tensor g = of(gate), u = of(up), w = of(down);
        const size_t i = p / static_cast<size_t>(k);
        b.plain->matmul(b.plain, one.data(), left.data() + i * d, &g, 1, nullptr);
        b.plain->matmul(b.plain, other.data(), left.data() + i * d, &u, 1, nullptr);
        b.plain->gelu_mul(b.plain, one.data(), one.data(), other.data(), static_cast<int64_t>(f));
        const std::vector<float> hidden = rounded(one, down.format->id, f);
        b.plain->matmul(b.plain, out.data(), hidden.data(), &w, 1, nullptr);
        for (size_t j = 0; j < d; j++) y[i * d + j] += shares[p] * out[j];
    }
    return y;
}

static void test_experts(const both &b, bool exact) {
    const struct {
        int32_t up, down;
        int64_t n, k, n_expert, d, d_expert;
    } cases[] = {
        {DG_Q4_K, DG_Q5_0, 24, 3, 5, 256, 96},  {DG_Q8_0, DG_Q8_0, 1, 1, 3, 64, 32},
        {DG_BF16, DG_BF16, 40, 2, 2, 64, 48},   {DG_F16, DG_Q8_0, 20, 2, 3, 64, 96},
        {DG_F32, DG_F32, 9, 8, 16, 32, 24},     {DG_Q6_K, DG_Q8_0, 30, 4, 64, 256, 64},
        {DG_Q4_0, DG_IQ4_NL, 17, 2, 4, 96, 64}, {DG_Q4_K, DG_Q5_K, 45, 2, 3, 256, 256},
        {DG_Q5_K, DG_Q6_K, 5, 1, 9, 256, 256},  {DG_Q5_1, DG_Q5_1, 20, 1, 2, 160, 704},
        {DG_Q4_K, DG_Q4_K, 20, 2, 6, 512, 256},
    };
    for (const auto &c : cases) {
        const weight gate(b, c.up, c.d, c.d_expert, c.n_expert), up(b, c.up, c.d, c.d_expert, c.n_expert),
            down(b, c.down, c.d_expert, c.d, c.n_expert);
        paired<float> x(b, random_floats(c.n * c.d, 1.0f)), y(b, static_cast<size_t>(c.n * c.d)),
            shares(b, random_floats(c.n * c.k, 0.5f));
        std::vector<int32_t> chosen;
        for (int64_t i = 0; i < c.n; i++) { /* skewed: low experts often, some never */
            std::vector<int32_t> row;
            while (static_cast<int64_t>(row.size()) < c.k) {
                const auto e = static_cast<int32_t>(
                    static_cast<double>(c.n_expert) *
                    (row.size() < static_cast<size_t>(c.k) / 2 ? uniform() * uniform() : uniform()));
                bool taken = false;
                for (int32_t r : row) taken |= r == e;
                if (!taken) row.push_back(e);
            }
            chosen.insert(chosen.end(), row.begin(), row.end());
        }
        paired<int32_t> experts(b, chosen);
        paired<uint8_t> work(b, experts_work(c.n, c.k, c.d, c.d_expert, c.n_expert));
        b.plain->experts(b.plain, y.data(), x.data(), &gate.t, &up.t, &down.t, experts.data(), shares.data(), c.n, c.k,
                         nullptr, work.data());
        b.gpu->experts(b.gpu, y.device, x.device, &gate.t, &up.t, &down.t, experts.device, shares.device, c.n, c.k,
                       nullptr, work.device);
        const double error = error_between(y.fetch(), y.host);
        CHECK(error <= (exact ? 5e-6 : 3e-2), "%s and %s, %d of %d experts for %d tokens: off by %g",
              gate.t.format->name, down.t.format->name, static_cast<int>(c.k), static_cast<int>(c.n_expert),
              static_cast<int>(c.n), error);
        if (exact || !tiled(b, c.up, c.d) || !tiled(b, c.down, c.d_expert)) continue;
        const double left =
            error_between(y.fetch(), rounded_experts(b, x.host, gate.t, up.t, down.t, chosen, shares.host, c.n, c.k));
        CHECK(left <= 2e-3, "%s and %s, of rounded numbers: off by %g", gate.t.format->name, down.t.format->name,
              left); /* a hidden value may round the other way */
    }
}

/* NaN and infinity come out of every product of their row, however it rounds, and of no other's. */
static void test_no_numbers(const both &b) {
    const int64_t n = 3, d = 256, rows = 40, k = 2, n_expert = 3;
    const auto finite = [](const float *y, int64_t count) {
        int64_t many = 0;
        for (int64_t i = 0; i < count; i++) many += isfinite(y[i]) ? 1 : 0;
        return many;
    };
    for (int32_t format : {DG_F32, DG_BF16, DG_F16, DG_Q8_0, DG_Q5_1, DG_Q4_K, DG_Q6_K, DG_IQ4_NL})
        for (float odd : {NAN, INFINITY}) {
            std::vector<float> values = random_floats(n * d, 1.0f);
            values[static_cast<size_t>(d + 201)] = odd;
            paired<float> x(b, values), y(b, static_cast<size_t>(n * rows)), sums(b, static_cast<size_t>(n * d)),
                shares(b, random_floats(n * k, 0.5f));
            paired<int32_t> experts(b, std::vector<int32_t>{0, 1, 2, 1, 0, 2});
            const weight w(b, format, d, rows), gate(b, format, d, d, n_expert), up(b, format, d, d, n_expert),
                down(b, format, d, d, n_expert);
            paired<uint8_t> work(b, matmul_work(n, d) + experts_work(n, k, d, d, n_expert));
            b.gpu->matmul(b.gpu, y.device, x.device, &w.t, n, work.device);
            b.gpu->experts(b.gpu, sums.device, x.device, &gate.t, &up.t, &down.t, experts.device, shares.device, n, k,
                           nullptr, work.device);
            const std::vector<float> got = y.fetch(), mixed = sums.fetch();
            for (int64_t i = 0; i < n; i++) {
                CHECK(finite(got.data() + i * rows, rows) == (i == 1 ? 0 : rows), "%s by %g: row %d has %d numbers",
                      w.t.format->name, static_cast<double>(odd), static_cast<int>(i),
                      static_cast<int>(finite(got.data() + i * rows, rows)));
                CHECK(finite(mixed.data() + i * d, d) == (i == 1 ? 0 : d),
                      "%s by %g: experts make %d numbers of row %d", w.t.format->name, static_cast<double>(odd),
                      static_cast<int>(finite(mixed.data() + i * d, d)), static_cast<int>(i));
            }
        }
}

static void test(uint64_t seed) {
    for (bool exact : {true, false}) {
        const both b(exact);
        random_state = 1;
        test_matmul(b, exact);
        test_experts(b, exact);
        if (!exact) test_gathered(b);
        if (seed == 0) test_no_numbers(b);
    }
}

int main(int argc, char **argv) { return run_seeds("cuda matmul", argc, argv, test); }
