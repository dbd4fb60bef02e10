/* The canvas ops between heads, against the CPU's. */
#include "harness.h"

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

static void test(uint64_t seed) {
    random_state = 1 + seed;
    const both b;
    for (int32_t n : {1, 20, 300, 1024})
        for (bool pinned : {false, true}) test_sampler(b, n, pinned && n > 1);
}

int main(int argc, char **argv) { return run_seeds("cuda sampler", argc, argv, test); }
