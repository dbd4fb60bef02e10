/* The head, its draws and the self-conditioning that follows, and choices from whole rows, against the reference. */
#include "harness.h"

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
    test_whole_rows(both());
}

int main(int argc, char **argv) {
    if (argc > 1) variant = argv[1];
    return run_seeds("cuda head", argc, argv, test);
}
