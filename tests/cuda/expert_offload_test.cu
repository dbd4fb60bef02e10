/* Experts under a plan, some in the device's memory, some passing through a ring of buffers, some left to the CPU: what
 * they are from their tensors, alone and recorded. */
#include <algorithm>
#include <memory>

#include "harness.h"
#include "expert_offload.cuh"

constexpr int LAYERS = 3;
constexpr int64_t N = 6, K = 3, EXPERTS = 7;

struct shape {
    int32_t up, down;
    int64_t d, d_expert;
};
struct split {
    int32_t pinned, streamed, slots, per_slot;
};

/* Layers with the same arrays twice: placed tensor by tensor, and as a model binds them. */
struct model {
    std::vector<std::unique_ptr<weight>> placed;
    layer layers[LAYERS] = {};
    model(const both &b, const shape &s) {
        for (layer &w : layers) {
            tensor *const each[] = {&w.ffn_gate_exps, &w.ffn_up_exps, &w.ffn_down_exps};
            for (int i = 0; i < 3; i++) {
                placed.emplace_back(new weight(b, i == 2 ? s.down : s.up, i == 2 ? s.d_expert : s.d,
                                               i == 2 ? s.d : s.d_expert, EXPERTS));
                *each[i] = placed.back()->t;
                each[i]->placed = nullptr;
            }
        }
    }
};

static std::vector<int32_t> some_experts() {
    std::vector<int32_t> chosen;
    for (int64_t i = 0; i < N; i++)
        for (int64_t s = 0; s < K; s++)
            chosen.push_back(static_cast<int32_t>((i * i + 2 * s + (s == 2)) % EXPERTS)); /* three different ones */
    return chosen;
}

static void test_split(bool exact, const shape &s, const split &p) {
    const both b(exact);
    const model m(b, s);
    int32_t pinned[LAYERS], streamed[LAYERS], order[LAYERS][EXPERTS];
    int64_t at[3];
    bool beside = false;
    for (int l = 0; l < LAYERS; l++) {
        pinned[l] = p.pinned > l ? p.pinned - l : 0;
        streamed[l] = p.streamed;
        for (int32_t e = 0; e < EXPERTS; e++)
            order[l][(e * (l + 1) + l) % EXPERTS] = e; /* each layer in another order */
        beside |= pinned[l] + streamed[l] < EXPERTS;
    }
    const expert_plan plan = {m.layers, LAYERS, EXPERTS,  K,
                              order[0], pinned, streamed, p.per_slot * expert_layout(&m.layers[0], at),
                              p.slots,  4};
    b.gpu->place_experts(b.gpu, &plan);

    std::vector<std::unique_ptr<paired<float>>> x, y, shares;
    paired<int32_t> experts(b, some_experts());
    paired<uint8_t> work(b, experts_work(N, K, s.d, s.d_expert, EXPERTS));
    std::vector<std::vector<float>> want, near;
    for (int l = 0; l < LAYERS; l++) {
        x.emplace_back(new paired<float>(b, random_floats(N * s.d, 1.0f)));
        y.emplace_back(new paired<float>(b, static_cast<size_t>(N * s.d)));
        shares.emplace_back(new paired<float>(b, random_floats(N * K, 0.5f)));
        const tensor &gate = m.placed[static_cast<size_t>(3 * l)]->t, &up = m.placed[static_cast<size_t>(3 * l + 1)]->t,
                     &down = m.placed[static_cast<size_t>(3 * l + 2)]->t;
        b.gpu->experts(b.gpu, y.back()->device, x.back()->device, &gate, &up, &down, experts.device,
                       shares.back()->device, N, K, nullptr, work.device);
        want.push_back(y.back()->fetch());
        b.plain->experts(b.plain, y.back()->data(), x.back()->data(), &gate, &up, &down, experts.data(),
                         shares.back()->data(), N, K, nullptr, work.data());
        near.push_back(y.back()->host);
    }
    paired<int32_t> found(b, static_cast<size_t>(1));
    recording r = {};
    for (int round = 0; round < 4; round++) { /* alone, fewer layers, recorded, again */
        const int layers = round == 1 ? LAYERS - 1 : LAYERS;
        bool replayed = false;
        const std::vector<float> none(static_cast<size_t>(N * s.d), NAN);
        for (const auto &each : y) b.gpu->upload(b.gpu, each->device, none.data(), none.size() * sizeof(float));
        if (round >= 2) b.gpu->graph_begin(b.gpu, &r, &replayed);
        CHECK(replayed == (round == 3), "round %d", round);
        if (!replayed) {
            b.gpu->begin_pass(b.gpu, layers, found.device);
            for (int l = 0; l < layers; l++) {
                const layer &w = m.layers[l];
                b.gpu->experts(b.gpu, y[static_cast<size_t>(l)]->device, x[static_cast<size_t>(l)]->device,
                               &w.ffn_gate_exps, &w.ffn_up_exps, &w.ffn_down_exps, experts.device,
                               shares[static_cast<size_t>(l)]->device, N, K, nullptr, work.device);
            }
            b.gpu->end_pass(b.gpu);
        }
        if (round == 2) b.gpu->graph_end(b.gpu, &r);
        for (int l = 0; l < layers; l++) {
            const std::vector<float> got = y[static_cast<size_t>(l)]->fetch();
            const bool same = memcmp(got.data(), want[static_cast<size_t>(l)].data(), got.size() * sizeof(float)) == 0;
            const double error = error_between(got, near[static_cast<size_t>(l)]);
            CHECK(same || (beside && error <= (exact ? 5e-6 : 3e-2)),
                  "%s: %d pinned, %d streamed by %d through %d: layer %d, round %d is off by %g",
                  m.layers[0].ffn_gate_exps.format->name, pinned[l], streamed[l], p.per_slot, p.slots, l, round, error);
            for (int64_t i = 0; i < N; i++) { /* rows that ask the CPU for nothing are the device's, to the bit */
                const int32_t *const first = order[l], *const end = first + pinned[l] + streamed[l],
                                     *const chosen = &experts.host[static_cast<size_t>(i * K)];
                if (std::any_of(chosen, chosen + K, [&](int32_t e) { return std::find(first, end, e) == end; }))
                    continue;
                CHECK(memcmp(&got[static_cast<size_t>(i * s.d)],
                             &want[static_cast<size_t>(l)][static_cast<size_t>(i * s.d)],
                             static_cast<size_t>(s.d) * sizeof(float)) == 0,
                      "%d pinned, %d streamed: layer %d, row %d has no expert of the CPU's", pinned[l], streamed[l], l,
                      static_cast<int>(i));
            }
        }
    }
    b.gpu->graph_free(b.gpu, &r);
}

/* Of any card that there is: what it does not tell, as the emulated one its link, stays as it was. */
static void test_rated() {
    const both b;
    dg_machine m = {}, again = {};
    m.disk = again.disk = 3e9, m.pcie = again.pcie = 7e9;
    ops_device_rated(b.gpu, &m);
    ops_device_rated(b.gpu, &again);
    CHECK(m.gpu > 3e10 && m.gpu < 3e13, "memory at %g bytes per second", m.gpu);
    CHECK(m.gpu_ops > 1e12 && m.gpu_ops < 1e17, "%g operations per second", m.gpu_ops);
    CHECK(m.pcie > 1e8 && m.pcie < 1e12 && m.disk == 3e9 && m.ram == 0, "a link of %g bytes per second", m.pcie);
    CHECK(memcmp(&m, &again, sizeof m) == 0, "another time, other rates");
    ops_device_rated(b.plain, &m);
    CHECK(memcmp(&m, &again, sizeof m) == 0, "a CPU has no rates of a GPU's");
}

static void test(uint64_t seed) {
    if (seed == 0) test_rated();
    const shape exact_shape = {DG_F32, DG_F32, 32, 24},
                shapes[] = {{DG_Q8_0, DG_Q8_0, 64, 32}, {DG_Q4_K, DG_Q5_0, 256, 96}, {DG_Q8_0, DG_Q6_K, 64, 256}};
    const split splits[] = {{EXPERTS, 0, 0, 1}, {0, EXPERTS, 2, 1}, {2, 5, 2, 2},
                            {2, 3, 4, 1},       {1, 0, 0, 1},       {0, 0, 0, 1}};
    for (const split &p : splits) {
        random_state = 1;
        test_split(true, exact_shape, p);
        test_split(false, shapes[seed % 3], p);
    }
}

int main(int argc, char **argv) { return run_seeds("cuda expert offload", argc, argv, test); }
