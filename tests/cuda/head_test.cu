/* The head, its draws and the self-conditioning that follows, and the sampler between steps, against the reference. */
#include "harness.h"
extern "C" {
#include "random.h"
#include "sampler.h"
}

/* Room of the head op on both sides. */
struct self_cond_pair {
    const both &b;
    self_cond plain, gpu;
    self_cond_pair(const both &side, int64_t n, int64_t n_vocab, int64_t d)
        : b(side), plain(self_cond_new(n, n_vocab, d)) {
        void *memory = nullptr;
        self_cond_lay_out(&gpu, n, n_vocab, d, false, nullptr);
        b.gpu->reserve(b.gpu, &memory, gpu.bytes);
        self_cond_lay_out(&gpu, n, n_vocab, d, false, memory);
    }
    ~self_cond_pair() {
        b.gpu->release(b.gpu, gpu.memory, gpu.bytes);
        self_cond_free(&plain);
    }
    self_cond_pair(const self_cond_pair &) = delete;
};

/* Cumulative shares of a row as the reference has them: may the draw with u be this id, rounding allowed for? */
static bool is_draw(const float *z, int64_t n_vocab, double u, int32_t id, double slack) {
    double peak = -INFINITY, total = 0.0, below = 0.0, own = 0.0;
    for (int64_t v = 0; v < n_vocab; v++) peak = static_cast<double>(z[v]) > peak ? static_cast<double>(z[v]) : peak;
    for (int64_t v = 0; v < n_vocab; v++) {
        const double p = exp(static_cast<double>(z[v]) - peak);
        if (v < id) below += p;
        if (v == id) own = p;
        total += p;
    }
    return u >= below / total - slack && u <= (below + own) / total + slack;
}

static void test_head(bool exact, int32_t format, int64_t n_vocab, int64_t d, float temperature, float spread) {
    const both b(exact);
    const int64_t n = 5;
    const float cap = 30.0f, scale = 16.0f;
    const weight table(b, format, d, n_vocab);
    self_cond_pair scratch(b, n, n_vocab, d);
    paired<float> at(b, std::vector<float>{temperature});
    paired<double> u(b, std::vector<double>{0.03, 0.31, 0.5, 0.77, 0.995});
    paired<dg_choice> choices(b, static_cast<size_t>(n));
    paired<float> y(b, static_cast<size_t>(n * d));
    paired<uint8_t> work(b, matmul_work(n, d) + self_condition_work(n, d));
    const bool which[5] = {false, true, false, false, true};
    paired<uint8_t> pinned(b, std::vector<uint8_t>{0, 1, 0, 0, 1});
    paired<int32_t> given(b, std::vector<int32_t>{0, 7, 0, 0, 40});
    std::vector<float> wide(static_cast<size_t>(n * n_vocab));
    for (int step = 0; step < 2; step++) {
        paired<float> x(b, random_floats(n * d, spread));
        const head_part plain = {n, at.data(), u.data(), choices.data(), &scratch.plain},
                        gpu = {n, at.device, u.device, choices.device, &scratch.gpu};
        b.plain->head(b.plain, &plain, 1, x.data(), &table.t, n, cap, work.data());
        b.gpu->head(b.gpu, &gpu, 1, x.device, &table.t, n, cap, work.device);
        const std::vector<dg_choice> got = choices.fetch();
        for (int64_t i = 0; i < n; i++) {
            const dg_choice &want = choices.host[static_cast<size_t>(i)], &is = got[static_cast<size_t>(i)];
            const float *z = scratch.plain.z + i * n_vocab;
            CHECK(is.argmax == want.argmax || z[is.argmax] >= z[want.argmax] - (exact ? 1e-5f : 0.3f) / temperature,
                  "%s: argmax %d, the reference has %d", table.t.format->name, is.argmax, want.argmax);
            CHECK(fabsf(is.entropy - want.entropy) <= (exact ? 1e-4f : 0.1f) * (1.0f + want.entropy),
                  "%s: entropy %g, the reference has %g", table.t.format->name, static_cast<double>(is.entropy),
                  static_cast<double>(want.entropy));
            CHECK(is_draw(z, n_vocab, u.host[static_cast<size_t>(i)], is.sample, exact ? 1e-5 : 0.1),
                  "%s, %d ids: row %d draws %d, the reference %d", table.t.format->name, static_cast<int>(n_vocab),
                  static_cast<int>(i), is.sample, want.sample);
        }
        if (step == 1) { /* two rows are given: one condition on itself, or on nothing */
            scratch.plain.pinned = which, scratch.gpu.pinned = reinterpret_cast<bool *>(pinned.device);
            scratch.plain.given = exact ? given.data() : nullptr, scratch.gpu.given = exact ? given.device : nullptr;
        }
        b.plain->self_condition(b.plain, y.data(), &scratch.plain, &table.t, n, scale, work.data(), wide.data());
        b.gpu->self_condition(b.gpu, y.device, &scratch.gpu, &table.t, n, scale, work.device, nullptr);
        const double error = error_between(y.fetch(), y.host);
        CHECK(error <= (exact ? 1e-5 : 8e-2), "%s, %d ids: the conditioned embedding is off by %g",
              table.t.format->name, static_cast<int>(n_vocab), error);
    }
}

static void test_whole_rows(const both &b) {
    const int64_t n = 3, n_vocab = SELF_COND_STRETCH + 700, d = 64;
    const weight table(b, DG_Q8_0, d, n_vocab);
    paired<float> x(b, random_floats(n * d, 1.0f)), y(b, static_cast<size_t>(n * d)),
        scratch(b, static_cast<size_t>(n * (SELF_COND_STRETCH + 4)));
    paired<uint8_t> work(b, matmul_work(n, d));
    std::vector<float> want(static_cast<size_t>(n * n_vocab)), got(want.size());
    paired<int32_t> found(b, static_cast<size_t>(1));
    b.plain->logits(b.plain, want.data(), x.data(), &table.t, n, 30.0f, found.data(), 7, nullptr, nullptr);
    b.gpu->logits(b.gpu, got.data(), x.device, &table.t, n, 30.0f, found.device, 7, work.device, scratch.device);
    CHECK(found.host[0] == 0 && found.fetch()[0] == 0, "NaN or infinity was found where there is none");
    CHECK(error_between(got, want) <= 2e-6, "whole logits are off by %g", error_between(got, want));
    b.plain->self_condition_dense(b.plain, y.data(), want.data(), &table.t, n, 8.0f, nullptr);
    b.gpu->self_condition_dense(b.gpu, y.device, want.data(), &table.t, n, 8.0f, scratch.device);
    CHECK(error_between(y.fetch(), y.host) <= 1e-5, "conditioned on whole logits: off by %g",
          error_between(y.fetch(), y.host));

    paired<float> z(b, want);
    paired<double> u(b, std::vector<double>{0.01, 0.5, 0.99});
    paired<dg_choice> choices(b, 3);
    b.plain->choose(b.plain, choices.data(), z.data(), n, n_vocab, u.data());
    b.gpu->choose(b.gpu, choices.device, z.device, n, n_vocab, u.device);
    const std::vector<dg_choice> chosen = choices.fetch();
    for (size_t i = 0; i < 3; i++)
        CHECK(chosen[i].argmax == choices.host[i].argmax && chosen[i].sample == choices.host[i].sample &&
                  fabsf(chosen[i].entropy - choices.host[i].entropy) < 1e-5f,
              "row %d: argmax %d, sample %d, entropy %g; the reference has %d, %d, %g", static_cast<int>(i),
              chosen[i].argmax, chosen[i].sample, static_cast<double>(chosen[i].entropy), choices.host[i].argmax,
              choices.host[i].sample, static_cast<double>(choices.host[i].entropy));
}

/* Of all rows, the largest difference in parts of the row's length. */
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

/* Canvases one after the other in one call, at temperatures of their own, are canvases alone; a row with NaN has no
 * choice. */
static void test_parts(bool exact) {
    const both b(exact);
    const int64_t n = 4, n_vocab = 600, d = 64;
    const weight table(b, DG_Q8_0, d, n_vocab);
    std::vector<float> rows = random_floats(n * d, 1.0f);
    rows[static_cast<size_t>(2 * d + 5)] = NAN;
    paired<float> x(b, rows), at(b, std::vector<float>{0.05f, 0.4f});
    paired<double> u(b, std::vector<double>{0.2, 0.6, 0.4, 0.9});
    paired<dg_choice> choices(b, static_cast<size_t>(n)), alone(b, static_cast<size_t>(n));
    paired<uint8_t> work(b, matmul_work(n, d));
    const int64_t first[] = {0, 1}, sizes[] = {1, 3};
    self_cond_pair one(b, 1, n_vocab, d), three(b, 3, n_vocab, d);
    head_part parts[2];
    for (int i = 0; i < 2; i++) {
        parts[i] = head_part{sizes[i], at.device + i, u.device + first[i], alone.device + first[i],
                             i == 0 ? &one.gpu : &three.gpu};
        b.gpu->head(b.gpu, &parts[i], 1, x.device + first[i] * d, &table.t, sizes[i], 30.0f, work.device);
        parts[i].out = choices.device + first[i];
    }
    b.gpu->head(b.gpu, parts, 2, x.device, &table.t, n, 30.0f, work.device);
    const std::vector<dg_choice> got = choices.fetch(), want = alone.fetch();
    for (size_t i = 0; i < 4; i++) {
        CHECK(got[i].argmax == want[i].argmax && got[i].sample == want[i].sample &&
                  memcmp(&got[i].entropy, &want[i].entropy, sizeof(float)) == 0,
              "row %d of two canvases chooses %d and %d, alone %d and %d", static_cast<int>(i), got[i].argmax,
              got[i].sample, want[i].argmax, want[i].sample);
        CHECK((i == 2) == (got[i].argmax < 0 && got[i].sample < 0 && got[i].entropy != got[i].entropy),
              "row %d chooses %d", static_cast<int>(i), got[i].argmax);
    }
}

/* Random numbers, acceptance, the stop test and the next canvas: the CPU's, to the bit. */
static void test_sampler(const both &b, int32_t n, bool pinned) {
    const int32_t n_vocab = 1000;
    dg_sampling s = {};
    s.steps = 5, s.entropy_bound = 0.7f, s.t_min = 0.4f, s.t_max = 0.8f, s.stability = 1, s.confidence = 0.2f;
    canvas_buffers plain, gpu;
    void *memory = nullptr;
    canvas_lay_out(&plain, n, n_vocab, nullptr);
    canvas_lay_out(&plain, n, n_vocab, calloc(1, plain.bytes));
    b.gpu->reserve(b.gpu, &memory, plain.bytes);
    canvas_lay_out(&gpu, n, n_vocab, memory);
    std::vector<uint8_t> seen(plain.bytes);
    const auto same = [&](const void *mine, const void *theirs, size_t bytes, const char *what, int step) {
        b.gpu->download(b.gpu, seen.data(), theirs, bytes);
        CHECK(memcmp(seen.data(), mine, bytes) == 0, "%d positions, step %d: %s", n, step, what);
    };
    const size_t count = static_cast<size_t>(n);
    for (int32_t i = 0; pinned && i < n; i += 3) {
        plain.pins[i] = plain.fixed[i] = true;
        plain.ids[i] = 900 + i % 50;
        gpu.free = --plain.free;
    }
    b.gpu->upload(b.gpu, gpu.pins, plain.pins, count);
    b.gpu->upload(b.gpu, gpu.fixed, plain.fixed, count);
    b.gpu->upload(b.gpu, gpu.ids, plain.ids, count * sizeof *plain.ids);
    b.plain->canvas_init(b.plain, &plain, 0x123456789abcdefull, 3);
    b.gpu->canvas_init(b.gpu, &gpu, 0x123456789abcdefull, 3);
    same(plain.ids, gpu.ids, count * sizeof *plain.ids, "the first canvas", -1);
    for (int step = 0; step < 5; step++) {
        b.plain->canvas_draw(b.plain, &plain, &s);
        b.gpu->canvas_draw(b.gpu, &gpu, &s);
        same(plain.u, gpu.u, count * sizeof *plain.u, "u", step);
        same(plain.random_ids, gpu.random_ids, count * sizeof *plain.random_ids, "random ids", step);
        for (int32_t i = 0; i < n; i++) { /* equal entropies, and rows without a number; the last steps say the same */
            const int32_t drawn = static_cast<int32_t>(uniform() * (step == 1 ? 9.0 : 8.0));
            const float entropy = step >= 3 ? 0.01f : drawn == 8 ? NAN : static_cast<float>(drawn) / 16.0f;
            plain.choices[i] = dg_choice{entropy, step >= 3 ? i : static_cast<int32_t>(uniform() * 1000.0),
                                         static_cast<int32_t>(uniform() * 1000.0)};
        }
        b.gpu->upload(b.gpu, gpu.choices, plain.choices, count * sizeof *plain.choices);
        b.plain->canvas_step(b.plain, &plain, &s);
        b.gpu->canvas_step(b.gpu, &gpu, &s);
        same(plain.state, gpu.state, sizeof *plain.state, "the state", step);
        same(plain.argmax, gpu.argmax, count * sizeof *plain.argmax, "argmax", step);
        same(plain.entropy, gpu.entropy, count * sizeof *plain.entropy, "entropy", step);
        same(plain.order, gpu.order, count * sizeof *plain.order, "the order of entropy", step);
        same(plain.accepted, gpu.accepted, count, "what is accepted", step);
        same(plain.ids, gpu.ids, count * sizeof *plain.ids, "the next canvas", step);
        for (int32_t i = 0; i < n; i += 2) plain.accepted[i] = true; /* a caller's word */
        if (step == 3) {
            plain.fixed[n / 2] = true; /* final from here on */
            b.gpu->upload(b.gpu, gpu.fixed, plain.fixed, count);
        }
        b.gpu->upload(b.gpu, gpu.accepted, plain.accepted, count);
        b.plain->canvas_renoise(b.plain, &plain);
        b.gpu->canvas_renoise(b.gpu, &gpu);
        same(plain.ids, gpu.ids, count * sizeof *plain.ids, "the next canvas, accepted otherwise", step);
        CHECK(plain.state->converged == (step == 4), "the stop test at step %d", step);
    }
    b.gpu->release(b.gpu, gpu.memory, gpu.bytes);
    free(plain.memory);
}

static const char *variant = "plain";

static void test(uint64_t seed) {
    random_state = 1 + seed;
    const int64_t several =
        strcmp(variant, "plain") == 0 ? SELF_COND_STRETCH + SELF_COND_GROUP + 77 : 2 * SELF_COND_GROUP + 77;
    for (bool exact : {true, false}) {
        test_head(exact, DG_Q8_0, several, 32, 0.05f, 1.0f); /* few likely ids */
        test_head(exact, DG_Q6_K, 300, 256, 0.05f, 0.3f);
        test_head(exact, DG_F32, 2100, 32, 2.0f, 0.2f); /* flat: groups overflow, rows are dense */
        test_head(exact, DG_BF16, 41, 48, 0.5f, 1.0f);
    }
    for (bool exact : {true, false}) test_parts(exact);
    const both b, rounding(false);
    test_whole_rows(b);
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
    for (int32_t n : {1, 20, 300, 1024})
        for (bool pinned : {false, true}) test_sampler(b, n, pinned && n > 1);
}

int main(int argc, char **argv) {
    if (argc > 1) variant = argv[1];
    return run_seeds("cuda head", argc, argv, test);
}
