/* The answer in an argmax canvas: which positions are its tokens, the stop test for them alone, and its faults. */
#ifndef DG_ANSWER_H
#define DG_ANSWER_H

#include "dg.h"

/* The part that a position of a canvas has in the answer. */
enum { MARK_PIN = -1, MARK_NONE = 0, MARK_TOKEN = 1, MARK_END = 2 };

/* Sets marks[n], of which positions from `room` on have none. The answer has pins, and in each hole (a canvas without
 * pins is one) what stands before its first end id, without `filler`, a pad id, or -1. Returns where the end id of the
 * hole stands that the canvas ends with, or -1. */
int32_t answer_mark(int8_t *marks, const int32_t *argmax, const bool *pins, int32_t n, int32_t room,
                    const dg_config *config, int32_t filler);

/* The sampler's stop test for the marked part of the canvas alone, tokens and ends. `unchanged` counts the steps before
 * this one in a row in which that part was the same; changed[n]: positions that have another argmax than the step
 * before. */
bool answer_settled(const dg_sampling *s, const float *entropy, const bool *changed, const int8_t *marks, int32_t n,
                    int32_t *unchanged);

/* Returns the fault of an answer whose canvas of n positions gave it ids[count], `before` tokens standing before them.
 */
dg_fault answer_fault(const int32_t *ids, int32_t count, int32_t n, int32_t before, int32_t pad_id);

#endif
