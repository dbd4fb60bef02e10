/* The work of the canvas ops, position by position. The CPU loops over positions, a GPU gives each a thread: the same
 * functions, so the same bits. In a step, each of take, order, accept and next is done for all positions before the
 * next one starts. */
#ifndef DG_CANVAS_POSITION_H
#define DG_CANVAS_POSITION_H

#include "canvas.h"
#include "random.h"
#include "sampler.h"

/* The random draws of position i for a step. Step 0 is the canvas that a block starts from. */
DG_HD static inline void canvas_draw_at(const canvas_buffers *c, const canvas_state *now, int32_t step, int32_t i) {
    random_draw(now->seed, (uint32_t)now->block, (uint32_t)step, (uint32_t)i, (uint32_t)c->n_vocab, &c->u[i],
                &c->random_ids[i]);
}

/* Position i before the first step: a random id, unless it is pinned. */
DG_HD static inline void canvas_init_at(const canvas_buffers *c, const canvas_state *now, int32_t i) {
    canvas_draw_at(c, now, 0, i);
    if (c->free == c->n || !c->pins[i]) c->ids[i] = c->random_ids[i];
}

/* Takes the step's choice at position i; a fixed position chooses what it is. Returns whether the argmax is another
 * than that of the last step. */
DG_HD static inline bool canvas_take_at(const canvas_buffers *c, int32_t i) {
    dg_choice *choice = &c->choices[i];
    if (c->fixed[i]) {
        choice->entropy = 0.0f;
        choice->argmax = choice->sample = c->ids[i];
    }
    const bool changed = c->argmax[i] != choice->argmax;
    c->argmax[i] = choice->argmax;
    c->entropy[i] = choice->entropy;
    return changed;
}

/* Puts position i into the order of entropy. */
DG_HD static inline void canvas_order_at(const canvas_buffers *c, int32_t i) {
    c->order[sampler_place(c->entropy, c->n, i)] = i;
}

/* Accepts, makes the stop test and counts the step. One thread does it: sums are added in a fixed order. changed: some
 * position's argmax is another than that of the last step. */
DG_HD static inline void canvas_accept(const canvas_buffers *c, const dg_sampling *s, bool changed) {
    canvas_state *now = c->state;
    double sum = 0.0;
    for (int32_t i = 0; i < c->n; i++) sum += (double)c->entropy[i];
    sampler_accept(s, c->entropy, c->order, c->n, c->accepted);
    now->mean_entropy = (float)(sum / c->free);
    now->unchanged = changed || now->index == 0 ? 0 : now->unchanged + 1;
    now->converged = sampler_stop(s, now->unchanged, now->mean_entropy);
    now->index++;
}

/* Sets the id of position i for the next step: its argmax where it is fixed, its sample where it is accepted, else a
 * random id. */
DG_HD static inline void canvas_next_at(const canvas_buffers *c, int32_t i) {
    c->accepted[i] = c->accepted[i] || c->fixed[i];
    c->ids[i] = c->fixed[i] ? c->argmax[i] : c->accepted[i] ? c->choices[i].sample : c->random_ids[i];
}

#endif
