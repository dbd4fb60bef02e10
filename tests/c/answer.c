/* The part of a canvas that is the answer's, its stop test and its faults. */
#include "answer.h"

#include <string.h>

#include "check.h"

static void test_mark(void) {
    enum { END = 1, PAD = 0, ROOM = 6, N = 8 };
    const dg_config config = {.end_ids = {50, END}, .n_end_ids = 2};
    const int32_t ids[N] = {7, PAD, 8, END, 9, 7, 7, 50};
    bool pins[N] = {false};
    int8_t marks[N];
    const int8_t free_canvas[N] = {1, 1, 1, 2, 0, 0, 0, 0}, pinned[N] = {1, 0, 1, 2, 0, -1, 0, 0},
                 whole[N] = {1, 0, 1, 2, 0, -1, 1, 2};
    CHECK(answer_mark(marks, ids, pins, N, ROOM, &config, -1) == 3 && memcmp(marks, free_canvas, N) == 0,
          "up to the first end id, pad ids as others");
    CHECK(answer_mark(marks, ids, pins, 3, ROOM, &config, -1) == -1, "no end id");
    pins[5] = true;
    CHECK(answer_mark(marks, ids, pins, N, ROOM, &config, PAD) == -1 && memcmp(marks, pinned, N) == 0,
          "a pin, and no room behind it");
    CHECK(answer_mark(marks, ids, pins, N, N, &config, PAD) == 7 && memcmp(marks, whole, N) == 0,
          "a hole behind a pin has an end of its own");
}

static void test_settled(void) {
    dg_sampling s = {.steps = 4, .settled = 1, .stability = 1, .confidence = 0.01f};
    const float entropy[4] = {0.001f, 0.9f, 0.002f, 2.0f};
    const int8_t marks[4] = {MARK_TOKEN, MARK_PIN, MARK_END, MARK_NONE};
    bool changed[4] = {true, true, true, true};
    int32_t unchanged = 0;
    CHECK(!answer_settled(&s, entropy, changed, marks, 4, &unchanged) && unchanged == 0,
          "a first step is never stable");
    changed[0] = changed[2] = false;
    CHECK(answer_settled(&s, entropy, changed, marks, 4, &unchanged),
          "pins and what stands behind the end do not count");
    s.settled = 0;
    CHECK(!answer_settled(&s, entropy, changed, marks, 4, &unchanged) && unchanged == 2, "off, it only counts");
    s.settled = 1, s.confidence = 0.0015f;
    CHECK(!answer_settled(&s, entropy, changed, marks, 4, &unchanged),
          "the mean of the part, 0.0015, has to be below the bound");
}

static void test_fault(void) {
    int32_t ids[64] = {0};
    CHECK(answer_fault(ids, 0, 64, 0, 0) == DG_FAULT_EMPTY && answer_fault(ids, 9, 64, 0, 0) == DG_FAULT_EMPTY,
          "nothing, or pad ids alone");
    CHECK(answer_fault(ids, 9, 64, 3, 0) == DG_FAULT_NONE && answer_fault(ids, 0, 64, 3, 0) == DG_FAULT_NONE,
          "an answer that ends in its second canvas");
    for (int i = 0; i < 64; i++) ids[i] = i < 32 ? 100 + i : 7 + i % 8;
    CHECK(answer_fault(ids, 64, 64, 0, 0) == DG_FAULT_LOOP, "a last half of period 8");
    CHECK(answer_fault(ids, 63, 64, 0, 0) == DG_FAULT_NONE, "less than half of it");
    ids[63] = 99;
    CHECK(answer_fault(ids, 64, 64, 0, 0) == DG_FAULT_NONE, "one token differs");
    for (int i = 0; i < 64; i++) ids[i] = 7 + i % 9;
    CHECK(answer_fault(ids, 64, 64, 0, 0) == DG_FAULT_NONE, "a longer period is no loop");
}

int main(void) {
    test_mark();
    test_settled();
    test_fault();
    return check_done("answer");
}
