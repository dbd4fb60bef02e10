/* A device's memory under a budget: weights that are not experts, sessions, and then as many experts as there is
 * room for.
 *
 * Experts are placed when the first session is made, since what it takes goes before them, and stay where they are:
 * those of most tokens on the device, the next copied there by every pass, and those of fewest left to the CPU.
 */
#ifndef DG_VRAM_H
#define DG_VRAM_H

#include "model.h"

/* Plans for a budget of `bytes` in all, or for what is free less a margin where that is 0, before anything is loaded.
 * weights: bytes of those that are no experts. DG_ERROR_MEMORY, with the least that would do, where that cannot be. */
int vram_open(dg_model *model, int64_t bytes, int64_t weights, dg_error *error);
void vram_free(dg_model *model);

/* As those of budget.h. */
int vram_take(dg_model *model, int64_t bytes, const char *what, dg_error *error);
void vram_give(dg_model *model, int64_t bytes);
int32_t vram_context(const dg_model *model, int32_t most);
int64_t vram_room(const dg_model *model);
/* As budget_prefer, of experts that are yet to be placed. */
void vram_prefer(dg_model *model, const int64_t *tokens);
/* False before experts are placed. */
bool vram_placed(const dg_model *model, dg_plan *plan);

#endif
