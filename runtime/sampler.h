/* The entropy-bound sampler: schedule, accept, renoise and stop, on the few numbers per position that a step yields. */
#ifndef DG_SAMPLER_H
#define DG_SAMPLER_H

#include "dg.h"

/* Temperature of step `index` (0 first): n = steps - index are left, t_min + (t_max - t_min) * n / steps. */
float sampler_temperature(const dg_sampling *s, int32_t index);

/* As dg_accept; order: [2 * n] of room. */
void sampler_accept(const float *entropy, int32_t n, float bound, bool *accepted, int32_t *order);

/* canvas[i] = the sample where accepted, else a fresh random id: nothing stays frozen. */
void sampler_renoise(int32_t *canvas, int32_t n, const dg_choice *choices, const bool *accepted, const int32_t *random_ids);

/* Is this the step to stop at? unchanged: how many steps before this one in a row had the same argmax canvas. */
bool sampler_stop(const dg_sampling *s, int32_t unchanged, float mean_entropy);

#endif
