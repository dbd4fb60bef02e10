/* Elementwise operations, norms, rotations, embedding rows and routing against the reference. */
#include "harness.h"

static const int32_t FORMATS[] = {
#define DG_FORMAT(NAME, id, stem, block, encodes) id,
#include "formats.def"
#undef DG_FORMAT
};

static void test_elements(const both &b) {
    for (int64_t n : {1, 7, 33}) {
        const int64_t d = n == 7 ? 2816 : 100 + n;
        paired<float> x(b, random_floats(n * d, 2.0f)), other(b, random_floats(n * d, 2.0f)),
            y(b, static_cast<size_t>(n * d));
        const auto same = [&](const char *what, double tolerance) {
            const double error = error_between(y.fetch(), y.host);
            CHECK(error <= tolerance, "%s of %d x %d is off by %g", what, static_cast<int>(n), static_cast<int>(d),
                  error);
        };
        b.plain->add(b.plain, y.data(), x.data(), other.data(), n, d, 0.7f),
            b.gpu->add(b.gpu, y.device, x.device, other.device, n, d, 0.7f), same("add", 0);
        b.plain->add(b.plain, y.data(), x.data(), nullptr, n, d, 0.7f),
            b.gpu->add(b.gpu, y.device, x.device, nullptr, n, d, 0.7f), same("add of nothing", 0);
        b.plain->mul(b.plain, y.data(), x.data(), other.data(), n, d, 3.0f),
            b.gpu->mul(b.gpu, y.device, x.device, other.device, n, d, 3.0f), same("mul", 0);
        b.plain->gelu_mul(b.plain, y.data(), x.data(), other.data(), n * d),
            b.gpu->gelu_mul(b.gpu, y.device, x.device, other.device, n * d), same("gelu_mul", 1e-6);
        b.plain->softcap(b.plain, y.data(), n * d, 1.5f), b.gpu->softcap(b.gpu, y.device, n * d, 1.5f),
            same("softcap", 1e-6);
        b.plain->divide(b.plain, y.data(), x.data(), n * d, 0.3f),
            b.gpu->divide(b.gpu, y.device, x.device, n * d, 0.3f), same("divide", 1e-7);
        b.plain->rms_norm(b.plain, y.data(), x.data(), other.data(), n, d, 1e-6f),
            b.gpu->rms_norm(b.gpu, y.device, x.device, other.device, n, d, 1e-6f), same("rms_norm", 1e-6);
        b.plain->rms_norm(b.plain, y.data(), y.data(), nullptr, n, d, 1e-6f),
            b.gpu->rms_norm(b.gpu, y.device, y.device, nullptr, n, d, 1e-6f), same("rms_norm in place", 1e-6);
    }
}

static void test_rope(const both &b) {
    const int64_t shapes[][4] = {{1, 1, 2, 0}, {5, 3, 48, 17}, {3, 2, 512, 100000}};
    for (const auto &s : shapes) {
        const int64_t n = s[0], heads = s[1], dim = s[2], first = s[3];
        paired<float> x(b, random_floats(n * heads * dim, 1.0f));
        std::vector<float> frequencies(static_cast<size_t>(dim / 2));
        for (int64_t j = 0; j < dim / 2; j++)
            frequencies[static_cast<size_t>(j)] =
                powf(10000.0f, -2.0f * static_cast<float>(j) / static_cast<float>(dim));
        paired<float> f(b, frequencies);
        b.plain->rope(b.plain, x.data(), n, heads, dim, first, f.data());
        b.gpu->rope(b.gpu, x.device, n, heads, dim, first, f.device);
        const double error = error_between(x.fetch(), x.host);
        CHECK(error <= 1e-6, "%d rows of %d heads of %d, rotated from %d: off by %g", static_cast<int>(n),
              static_cast<int>(heads), static_cast<int>(dim), static_cast<int>(first), error);
    }
}

static void test_embed(const both &b) {
    for (int32_t format : FORMATS) {
        const weight table(b, format, 512, 40);
        paired<int32_t> ids(b, std::vector<int32_t>{39, 0, 7, 7, 21});
        paired<float> y(b, 5 * 512);
        b.plain->embed(b.plain, y.data(), &table.t, ids.data(), 5, 53.0f);
        b.gpu->embed(b.gpu, y.device, &table.t, ids.device, 5, 53.0f);
        const std::vector<float> got = y.fetch();
        CHECK(memcmp(got.data(), y.data(), got.size() * sizeof(float)) == 0,
              "rows of %s are not the reference's, to the bit", table.t.format->name);
    }
}

static void test_store(const both &b) {
    paired<float> x(b, random_floats(3 * 40, 4.0f));
    const both rounded(false); /* exact caches are float32 */
    paired<float> same(rounded, x.host);
    paired<uint16_t> cache(rounded, 8 * 40);
    rounded.gpu->store(rounded.gpu, cache.device, 5, same.device, 3, 40);
    float exactly[3 * 40];
    paired<float> floats(b, 3 * 40);
    b.gpu->store(b.gpu, floats.device, 0, x.device, 3, 40);
    b.gpu->download(b.gpu, exactly, floats.device, sizeof exactly);
    CHECK(memcmp(exactly, x.data(), sizeof exactly) == 0, "an exact cache");
    const std::vector<uint16_t> got = cache.fetch();
    for (size_t i = 0; i < got.size(); i++) {
        const uint16_t want = i < 5 * 40 ? 0 : half_from_float(x.host[i - 5 * 40]);
        CHECK(got[i] == want, "number %d of the cache is %04x, not %04x", static_cast<int>(i), got[i], want);
    }
}

static void test_route(const both &b) {
    const int64_t shapes[][3] = {{1, 1, 1}, {9, 5, 3}, {6, 128, 8}, {4, 40, 40}, {2, 1000, 6}};
    for (const auto &s : shapes) {
        const int64_t n = s[0], n_expert = s[1], k = s[2];
        paired<float> logits(b, random_floats(n * n_expert, 3.0f)), scale(b, random_floats(n_expert, 1.0f)),
            shares(b, static_cast<size_t>(n * k));
        for (size_t i = 0; i < logits.host.size(); i++)
            if (i % 3) logits.host[i] = static_cast<float>(static_cast<int>(logits.host[i])); /* many are equal */
        b.gpu->upload(b.gpu, logits.device, logits.data(), logits.host.size() * sizeof(float));
        paired<int32_t> experts(b, static_cast<size_t>(n * k));
        b.plain->route(b.plain, experts.data(), shares.data(), logits.data(), scale.data(), n, n_expert, k);
        b.gpu->route(b.gpu, experts.device, shares.device, logits.device, scale.device, n, n_expert, k);
        CHECK(experts.fetch() == experts.host, "the %d best of %d experts", static_cast<int>(k),
              static_cast<int>(n_expert));
        const double error = error_between(shares.fetch(), shares.host);
        CHECK(error <= 1e-6, "shares of %d of %d experts are off by %g", static_cast<int>(k),
              static_cast<int>(n_expert), error);
    }
}

/* The first mark under which NaN or infinity was seen stays. */
static void test_watch(const both &b) {
    paired<float> good(b, random_floats(3000, 1.0f)), bad(b, random_floats(3000, 1.0f));
    paired<int32_t> found(b, static_cast<size_t>(1));
    for (float odd : {NAN, INFINITY, -INFINITY}) {
        bad.host[2571] = odd;
        b.gpu->upload(b.gpu, bad.device, bad.data(), 3000 * sizeof(float));
        b.gpu->upload(b.gpu, found.device, found.data(), sizeof(int32_t));
        b.gpu->check_finite(b.gpu, found.device, good.device, 3000, 3);
        CHECK(found.fetch()[0] == 0, "finite numbers were marked");
        b.gpu->check_finite(b.gpu, found.device, bad.device, 3000, 5);
        b.gpu->check_finite(b.gpu, found.device, bad.device, 3000, 9);
        CHECK(found.fetch()[0] == 5, "%g was marked %d", static_cast<double>(odd), found.fetch()[0]);
    }
}

/* Copies of any size, to the caller's in pieces and whole; what is taken is told. */
static void test_memory(const both &b) {
    int64_t before, during, after;
    b.gpu->available(b.gpu, &before);
    for (size_t n : {size_t(1), size_t(STAGING), size_t(STAGING) + 1, size_t(300000)}) {
        std::vector<uint8_t> bytes(n);
        for (size_t i = 0; i < n; i++) bytes[i] = static_cast<uint8_t>(i * 7 + i / 251);
        paired<uint8_t> one(b, bytes), other(b, n + 3);
        b.gpu->copy(b.gpu, other.device + 3, one.device, n);
        const std::vector<uint8_t> got = other.fetch();
        CHECK(memcmp(got.data() + 3, bytes.data(), n) == 0 && got[0] + got[1] + got[2] == 0, "a copy of %d bytes",
              static_cast<int>(n));
        b.gpu->available(b.gpu, &during);
        CHECK(during <= before - static_cast<int64_t>(2 * n), "%d bytes are free beside what was taken, of %d",
              static_cast<int>(during), static_cast<int>(before));
    }
    b.gpu->available(b.gpu, &after);
    CHECK(after == before, "%d bytes did not come back", static_cast<int>(before - after));
    void *all = b.gpu;
    b.gpu->reserve(b.gpu, &all, static_cast<size_t>(before) * 2);
    dg_error error;
    CHECK(all == nullptr && ops_status(b.gpu, &error) == DG_OK, "more than there is");
}

/* Tokens per expert, of several calls together. */
static void test_count(const both &b) {
    const int64_t n_expert = 70;
    std::vector<int32_t> chosen(1000);
    for (int32_t &e : chosen) e = static_cast<int32_t>(uniform() * uniform() * static_cast<double>(n_expert));
    paired<int32_t> experts(b, chosen);
    paired<int64_t> counts(b, std::vector<int64_t>(n_expert, int64_t(1) << 40));
    std::vector<int64_t> want(n_expert), got(n_expert);
    for (int64_t n : {int64_t(1000), int64_t(1), int64_t(257)}) {
        b.plain->routing_add(b.plain, counts.data(), experts.data(), n);
        b.gpu->routing_add(b.gpu, counts.device, experts.device, n);
    }
    b.plain->routing_read(b.plain, want.data(), counts.data(), n_expert);
    b.gpu->routing_read(b.gpu, got.data(), counts.device, n_expert);
    CHECK(got == want && want[0] > (int64_t(1) << 40), "tokens of experts: of the first %lld, the reference has %lld",
          static_cast<long long>(got[0]), static_cast<long long>(want[0]));
}

/* A pass begins with nothing found. */
static void test_pass(const both &b) {
    paired<int32_t> found(b, std::vector<int32_t>{9});
    b.gpu->begin_pass(b.gpu, 0, found.device);
    b.gpu->end_pass(b.gpu);
    CHECK(found.fetch()[0] == 0, "a pass began with %d", found.fetch()[0]);
}

static void test(uint64_t) {
    const both b;
    random_state = 1;
    test_memory(b);
    test_count(b);
    test_pass(b);
    test_elements(b);
    test_watch(b);
    test_rope(b);
    test_embed(b);
    test_store(b);
    test_route(b);
}

int main(int argc, char **argv) { return run_seeds("cuda float", argc, argv, test); }
