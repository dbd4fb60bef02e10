#include "answer.h"

#include "sampler.h"

static bool is_end(const dg_config *c, int32_t id) {
    for (int32_t i = 0; i < c->n_end_ids; i++)
        if (c->end_ids[i] == id) return true;
    return false;
}

int32_t answer_mark(int8_t *marks, const int32_t *argmax, const bool *pins, int32_t n, int32_t room,
                    const dg_config *config, int32_t filler) {
    int32_t end = -1;
    for (int32_t i = 0; i < n; i++) {
        if (pins[i]) {
            end = -1;
            marks[i] = MARK_PIN;
        } else if (end >= 0 || i >= room) {
            marks[i] = MARK_NONE;
        } else if (is_end(config, argmax[i])) {
            end = i;
            marks[i] = MARK_END;
        } else {
            marks[i] = argmax[i] == filler ? MARK_NONE : MARK_TOKEN;
        }
    }
    return end;
}

bool answer_settled(const dg_sampling *s, const float *entropy, const bool *changed, const int8_t *marks, int32_t n,
                    int32_t *unchanged) {
    bool same = true;
    double sum = 0.0;
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++)
        if (marks[i] > MARK_NONE) {
            same = same && !changed[i];
            sum += (double)entropy[i];
            count++;
        }
    *unchanged = same ? *unchanged + 1 : 0;
    return s->settled && sampler_stop(s, *unchanged, count ? (float)(sum / count) : 0.0f);
}

/* A loop is a last half of the canvas, all of it the answer's, with a period of at most an eighth: four times or
 * more. */
dg_fault answer_fault(const int32_t *ids, int32_t count, int32_t n, int32_t before, int32_t pad_id) {
    int32_t real = before;
    for (int32_t i = 0; i < count; i++) real += ids[i] != pad_id;
    if (real == 0) return DG_FAULT_EMPTY;
    const int32_t half = n / 2;
    for (int32_t period = 1; count >= half && period <= n / 8; period++) {
        int32_t i = count - half + period;
        while (i < count && ids[i] == ids[i - period]) i++;
        if (i == count) return DG_FAULT_LOOP;
    }
    return DG_FAULT_NONE;
}
