/* The sampler's rules, one by one, and the random draws. */
#include "sampler.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "random.h"

static void test_philox(void) { /* known answers of the Random123 library */
    uint32_t zero[4] = {0, 0, 0, 0}, ones[4] = {~0u, ~0u, ~0u, ~0u},
             pi[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    philox(0, zero);
    philox(~0ull, ones);
    philox(0x299f31d0a4093822ull, pi);
    CHECK(zero[0] == 0x6627e8d5 && zero[1] == 0xe169c58d && zero[2] == 0xbc57ac4c && zero[3] == 0x9b00dbd8,
          "counter 0, key 0");
    CHECK(ones[0] == 0x408f276d && ones[1] == 0x41c83b0e && ones[2] == 0xa20bc7c6 && ones[3] == 0x6d5451fd, "all ones");
    CHECK(pi[0] == 0xd16cfe09 && pi[1] == 0x94fdcceb && pi[2] == 0x5001e420 && pi[3] == 0x24126ea1, "digits of pi");
}

static void test_draws(void) {
    double u[512], v[512];
    int32_t ids[512], same[512];
    dg_draw(7, 0, 1, 512, 64, u, ids);
    dg_draw(7, 0, 1, 100, 64, v, same);
    CHECK(memcmp(u, v, sizeof *u * 100) == 0 && memcmp(ids, same, sizeof *ids * 100) == 0,
          "a draw depends on its own position alone");
    int seen[64] = {0};
    double mean = 0.0;
    for (int i = 0; i < 512; i++) {
        CHECK(u[i] > 0.0 && u[i] < 1.0 && ids[i] >= 0 && ids[i] < 64, "draw %d: %g %d", i, u[i], ids[i]);
        seen[ids[i]]++;
        mean += u[i] / 512.0;
    }
    CHECK(fabs(mean - 0.5) < 0.05, "mean of the draws %g", mean);
    int used = 0;
    for (int i = 0; i < 64; i++) used += seen[i] > 0;
    CHECK(used > 60, "ids used: %d of 64", used);
    dg_draw(7, 1, 1, 512, 64, v, same);
    CHECK(memcmp(ids, same, sizeof ids) != 0, "another block, other draws");
    dg_draw(8, 0, 1, 512, 64, v, same);
    CHECK(memcmp(ids, same, sizeof ids) != 0, "another seed, other draws");
}

static void test_accept(void) {
    /* certain first; a position's own entropy does not count; the lower position first among equals */
    const float entropy[6] = {0.05f, 0.04f, 0.04f, 0.9f, 0.0f, 0.05f};
    bool accepted[6];
    dg_error error;
    dg_accept(entropy, 6, 0.1f, accepted, &error); /* in order 4 1 2 0 5 3, before them 0 0 .04 .08 .13 .18 */
    const bool want[6] = {true, true, true, false, true, false};
    CHECK(memcmp(accepted, want, sizeof want) == 0, "accepted %d%d%d%d%d%d", accepted[0], accepted[1], accepted[2],
          accepted[3], accepted[4], accepted[5]);
    dg_accept(entropy, 6, 0.0f, accepted, &error);
    CHECK(accepted[4] && accepted[1] && !accepted[2] && !accepted[0],
          "bound 0: the certain ones and the first that is not");
    dg_accept(entropy, 6, 1e9f, accepted, &error);
    CHECK(accepted[0] && accepted[1] && accepted[2] && accepted[3] && accepted[4] && accepted[5], "no bound: all");
    const float equal[4] = {0.06f, 0.06f, 0.06f, 0.06f};
    dg_accept(equal, 4, 0.1f, accepted, &error);
    CHECK(accepted[0] && accepted[1] && !accepted[2] && !accepted[3], "equals: the lower positions");
}

static void test_schedule_and_stop(void) {
    dg_sampling s = {.steps = 4, .t_min = 0.4f, .t_max = 0.8f, .stability = 2, .confidence = 0.005f};
    CHECK(fabsf(sampler_temperature(&s, 0) - 0.8f) < 1e-6f, "the first step is at t_max: n = N");
    CHECK(fabsf(sampler_temperature(&s, 3) - 0.5f) < 1e-6f, "the last is one step above t_min: n = 1");
    CHECK(!sampler_stop(&s, 1, 0.001f) && sampler_stop(&s, 2, 0.001f) && !sampler_stop(&s, 2, 0.005f),
          "stable for 2 steps and below the bound");
    s.stability = 0;
    CHECK(sampler_stop(&s, 0, 0.001f), "stability 0 is always stable");
    s.t_min = s.t_max = 0.0f;
    CHECK(sampler_temperature(&s, 0) > 0.0f, "temperature 0 is a small one");
}

static void test_renoise(void) {
    int32_t canvas[3] = {1, 2, 3};
    const dg_choice choices[3] = {{0.0f, 10, 11}, {0.0f, 20, 21}, {0.0f, 30, 31}};
    const bool accepted[3] = {true, false, true};
    const int32_t random_ids[3] = {7, 8, 9};
    sampler_renoise(canvas, 3, choices, accepted, random_ids);
    CHECK(canvas[0] == 11 && canvas[1] == 8 && canvas[2] == 31, "samples where accepted, noise elsewhere: %d %d %d",
          canvas[0], canvas[1], canvas[2]);
}

static void test_settled(void) {
    dg_sampling s = {.steps = 4, .settled = 1, .stability = 1, .confidence = 0.01f};
    const float entropy[4] = {0.001f, 0.9f, 0.002f, 2.0f};
    const int8_t marks[4] = {MARK_TOKEN, MARK_PIN, MARK_END, MARK_NONE};
    bool changed[4] = {true, true, true, true};
    int32_t unchanged = 0;
    CHECK(!sampler_settled(&s, entropy, changed, marks, 4, &unchanged) && unchanged == 0,
          "a first step is never stable");
    changed[0] = changed[2] = false;
    CHECK(sampler_settled(&s, entropy, changed, marks, 4, &unchanged),
          "pins and what stands behind the end do not count");
    s.settled = 0;
    CHECK(!sampler_settled(&s, entropy, changed, marks, 4, &unchanged) && unchanged == 2, "off, it only counts");
    s.settled = 1, s.confidence = 0.0015f;
    CHECK(!sampler_settled(&s, entropy, changed, marks, 4, &unchanged),
          "the mean of the part, 0.0015, has to be below the bound");
}

static void test_plateau(void) {
    dg_sampling s = {.plateau = 2};
    sampler_low low = {0};
    const float mean[6] = {1.0f, 0.8f, 0.75f, 0.71f, 0.75f, 0.74f};
    const bool want[6] = {false, false, false, false, false, true}; /* lows: 1.0, 0.8, 0.71 */
    for (int i = 0; i < 6; i++) CHECK(sampler_plateau(&s, i, mean[i], &low) == want[i], "step %d", i);
    CHECK(!sampler_plateau(&s, 0, 5.0f, &low) && low.mean == 5.0f, "a canvas starts anew");
    s.plateau = 0;
    for (int i = 0; i < 9; i++) CHECK(!sampler_plateau(&s, 1, 5.0f, &low), "off");
}

static void test_fault(void) {
    int32_t ids[64] = {0};
    CHECK(sampler_fault(ids, 0, 64, 0, 0) == DG_FAULT_EMPTY && sampler_fault(ids, 9, 64, 0, 0) == DG_FAULT_EMPTY,
          "nothing, or pad ids alone");
    CHECK(sampler_fault(ids, 9, 64, 3, 0) == DG_FAULT_NONE && sampler_fault(ids, 0, 64, 3, 0) == DG_FAULT_NONE,
          "an answer that ends in its second canvas");
    for (int i = 0; i < 64; i++) ids[i] = i < 32 ? 100 + i : 7 + i % 8;
    CHECK(sampler_fault(ids, 64, 64, 0, 0) == DG_FAULT_LOOP, "a last half of period 8");
    CHECK(sampler_fault(ids, 63, 64, 0, 0) == DG_FAULT_NONE, "less than half of it");
    ids[63] = 99;
    CHECK(sampler_fault(ids, 64, 64, 0, 0) == DG_FAULT_NONE, "one token differs");
    for (int i = 0; i < 64; i++) ids[i] = 7 + i % 9;
    CHECK(sampler_fault(ids, 64, 64, 0, 0) == DG_FAULT_NONE, "a longer period is no loop");
}

static void test_efforts(void) {
    dg_error error;
    int32_t n = 0;
    for (; dg_effort_at(n); n++) {
        dg_sampling s = {.max_tokens = 1, .steps = 48, .t_max = 0.8f, .t_min = 0.4f, .seed = 5};
        CHECK(dg_effort_apply(n, &s) && dg_sampling_check(&s, &error) == DG_OK && s.seed == 5, "%s: %s",
              dg_effort_at(n)->name, error.message);
    }
    dg_sampling s = {.plateau = 3, .settled = 1, .short_canvas = 1, .pins_conditioned = 1, .retries = 2, .steps = 7};
    CHECK(n == 4 && !dg_effort_apply(n, &s) && s.plateau == 3, "none past the end");
    dg_effort_apply(n - 1, &s);
    CHECK(!s.plateau && !s.settled && !s.short_canvas && !s.pins_conditioned && !s.retries && s.steps == 7,
          "the reference has nothing of our own");
}

static void test_options(void) {
    dg_error error;
    dg_sampling s = {.max_tokens = 1, .steps = 1, .t_max = 1.0f};
    CHECK(dg_sampling_check(&s, &error) == DG_OK, "%s", error.message);
    s.steps = 0;
    CHECK(dg_sampling_check(&s, &error) == DG_ERROR_USAGE && strstr(error.message, "steps"), "steps 0 is named");
    s.steps = 1, s.t_max = NAN;
    CHECK(dg_sampling_check(&s, &error) == DG_ERROR_USAGE && strstr(error.message, "t_max"), "NaN is named");
}

int main(void) {
    test_philox();
    test_draws();
    test_accept();
    test_schedule_and_stop();
    test_renoise();
    test_settled();
    test_plateau();
    test_fault();
    test_efforts();
    test_options();
    return check_done("sampler");
}
