/* The sampler's rules, one by one, and the random draws. */
#include "sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "canvas_position.h"
#include "check.h"
#include "cpu/cpu.h"

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

/* Positions by place: the lower entropy first, NaN last, the lower position among equals. */
static void test_order(void) {
    static float entropy[1024];
    static int32_t order[1024];
    const float values[] = {0.25f, 0.0f, NAN, 2.0f, -0.0f, INFINITY, 0.25f, 1e-30f};
    const int32_t sizes[] = {1, 2, 3, 8, 97, 256, 1024};
    for (size_t size = 0; size < sizeof sizes / sizeof *sizes; size++) {
        const int32_t n = sizes[size];
        for (int32_t i = 0; i < n; i++) {
            uint32_t random[4] = {(uint32_t)i, 0, 0, 0};
            philox((uint64_t)n, random);
            entropy[i] = values[random[0] % 8];
            order[i] = -1;
        }
        for (int32_t i = 0; i < n; i++) {
            const int32_t place = sampler_place(entropy, n, i);
            CHECK(place >= 0 && place < n && order[place] < 0, "%d positions: place %d of position %d", n, place, i);
            order[place] = i;
        }
        for (int32_t place = 1; place < n; place++) {
            const float a = entropy[order[place - 1]], b = entropy[order[place]];
            const bool lower = a < b || (isnan(b) && !isnan(a)), equal = a == b || (isnan(a) && isnan(b));
            CHECK(lower || (equal && order[place - 1] < order[place]), "%d positions: %g at %d before %g at %d", n,
                  (double)a, order[place - 1], (double)b, order[place]);
        }
    }
}

static void test_accept_nan(void) {
    const float entropy[4] = {NAN, 0.06f, NAN, 0.06f};
    bool accepted[4];
    dg_error error;
    dg_accept(entropy, 4, 0.2f, accepted, &error); /* in order 1 3 0 2, before them 0 .06 .12 NaN */
    CHECK(accepted[1] && accepted[3] && accepted[0] && !accepted[2], "what stands behind NaN is not accepted");
    dg_accept(entropy, 1, 0.0f, accepted, &error);
    CHECK(accepted[0], "nothing stands before the only position");
    CHECK(dg_accept(entropy, 0, 0.0f, accepted, &error) == DG_OK, "no position");
}

enum { POSITIONS = 4, WORDS = 50 };

/* One step of a canvas of four: of the others, position 1 is certain, 3 is less so, and 2 is out of the bound. */
static void test_step(void) {
    const ops o = {.canvas_renoise = host_canvas_renoise};
    const dg_sampling s = {
        .steps = 4, .entropy_bound = 0.1f, .t_min = 0.4f, .t_max = 0.8f, .stability = 1, .confidence = 1.0f};
    const dg_choice choices[POSITIONS] = {{9.0f, 40, 41}, {0.0f, 10, 11}, {0.5f, 20, 21}, {0.25f, 30, 31}};
    canvas_buffers c;
    double u[POSITIONS];
    int32_t ids[POSITIONS];
    canvas_lay_out(&c, POSITIONS, WORDS, NULL);
    void *memory = calloc(1, c.bytes);
    canvas_lay_out(&c, POSITIONS, WORDS, memory);
    c.pins[0] = c.fixed[0] = true;
    c.free = 3;
    c.ids[0] = 7;
    host_canvas_init(&o, &c, 5, 2);
    dg_draw(5, 2, 0, POSITIONS, WORDS, u, ids);
    CHECK(c.ids[0] == 7 && memcmp(c.ids + 1, ids + 1, 3 * sizeof *ids) == 0, "a pin, and random ids beside it");
    for (int32_t step = 0; step < 2; step++) {
        host_canvas_draw(&o, &c, &s);
        dg_draw(5, 2, step + 1, POSITIONS, WORDS, u, ids);
        CHECK(memcmp(c.u, u, sizeof u) == 0 && memcmp(c.random_ids, ids, sizeof ids) == 0, "the draws of step %d",
              step);
        CHECK(c.state->temperature == sampler_temperature(&s, step), "the temperature of step %d", step);
        memcpy(c.choices, choices, sizeof choices);
        host_canvas_step(&o, &c, &s);
        CHECK(c.argmax[0] == 7 && c.argmax[1] == 10 && c.argmax[2] == 20 && c.argmax[3] == 30, "the argmax canvas");
        CHECK(c.entropy[0] == 0.0f && c.entropy[2] == 0.5f && c.state->mean_entropy == 0.25f,
              "a pin is certain, and does not count in the mean");
        CHECK(c.accepted[0] && c.accepted[1] && !c.accepted[2] && c.accepted[3], "in order 0 1 3 2");
        CHECK(c.ids[0] == 7 && c.ids[1] == 11 && c.ids[2] == ids[2] && c.ids[3] == 31,
              "samples where accepted, random ids elsewhere");
        CHECK(c.state->index == step + 1 && c.state->unchanged == step && c.state->converged == step,
              "the same argmax canvas again, at step %d", step);
    }
    c.fixed[2] = true;
    c.accepted[3] = false;
    host_canvas_renoise(&o, &c);
    CHECK(c.ids[0] == 7 && c.ids[1] == 11 && c.ids[2] == 20 && c.ids[3] == ids[3] && c.accepted[2],
          "what is fixed is the argmax and accepted");
    free(memory);
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
    s.t_max = 1.0f;
    s.sampler = DG_SAMPLER_COUNT;
    CHECK(dg_sampling_check(&s, &error) == DG_ERROR_USAGE && strstr(error.message, "sampler"), "no such sampler");
    CHECK(!dg_sampler_at(DG_SAMPLER_COUNT) && !strcmp(dg_sampler_at(DG_SAMPLER_ENTROPY_BOUND)->name, "entropy-bound"),
          "samplers by number");
}

int main(void) {
    test_philox();
    test_draws();
    test_accept();
    test_order();
    test_accept_nan();
    test_schedule_and_stop();
    test_step();
    test_plateau();
    test_efforts();
    test_options();
    return check_done("sampler");
}
