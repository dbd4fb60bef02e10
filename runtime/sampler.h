/* Samplers, on the few numbers per position that a step yields: the temperature of a step, which positions it accepts,
 * and when a canvas is done. One source for the CPU and for CUDA kernels, with the same bits. */
#ifndef DG_SAMPLER_H
#define DG_SAMPLER_H

#include "blocks.h"
#include "dg.h"

/* ---- What samplers are made of; samplers.def says which has what ---- */

/* n = steps - index steps are left: t_min + (t_max - t_min) * n / steps. */
DG_HD static inline float temperature_linear(const dg_sampling *s, int32_t index) {
    const double left = (double)(s->steps - index) / (double)s->steps;
    const double t = (double)s->t_min + ((double)s->t_max - (double)s->t_min) * left;
    return t > 1e-4 ? (float)t : 1e-4f;
}

/* The place of position i in the order of entropy[n]: how many positions come before it. The lower entropy comes
 * first, NaN last, and the lower position among equals. */
DG_HD static inline int32_t sampler_place(const float *entropy, int32_t n, int32_t i) {
    const float mine = entropy[i];
    int32_t place = 0;
    if (mine != mine) {
        for (int32_t j = 0; j < n; j++) place += entropy[j] == entropy[j] || j < i;
        return place;
    }
    for (int32_t j = 0; j < i; j++) place += entropy[j] <= mine;
    for (int32_t j = i + 1; j < n; j++) place += entropy[j] < mine;
    return place;
}

/* A position is accepted while the entropies before it, added in their order, sum to at most entropy_bound. */
DG_HD static inline void accept_entropy_bound(const dg_sampling *s, const float *entropy, const int32_t *order,
                                              int32_t n, bool *accepted) {
    double before = 0.0;
    for (int32_t place = 0; place < n; place++) {
        accepted[order[place]] = before <= (double)s->entropy_bound;
        before += (double)entropy[order[place]];
    }
}

DG_HD static inline bool stop_stable_and_certain(const dg_sampling *s, int32_t unchanged, float mean_entropy) {
    return unchanged >= s->stability && mean_entropy < s->confidence;
}

/* ---- The sampler that s->sampler chooses; dg_sampling_check has refused other numbers ---- */

/* The temperature of step `index`, 0 first. */
DG_HD static inline float sampler_temperature(const dg_sampling *s, int32_t index) {
    switch (s->sampler) {
    default:
#define DG_SAMPLER(ID, name, temperature, accept, stop, help) \
    case DG_SAMPLER_##ID: return temperature(s, index);
#include "samplers.def"
#undef DG_SAMPLER
    }
}

/* Which of n positions keep their samples. order[n]: the positions in the order of entropy, as sampler_place has it.
 * One thread calls it: sums are added in a fixed order. */
DG_HD static inline void sampler_accept(const dg_sampling *s, const float *entropy, const int32_t *order, int32_t n,
                                        bool *accepted) {
    switch (s->sampler) {
    default:
#define DG_SAMPLER(ID, name, temperature, accept, stop, help) \
    case DG_SAMPLER_##ID: accept(s, entropy, order, n, accepted); return;
#include "samplers.def"
#undef DG_SAMPLER
    }
}

/* Is this the step to stop at? unchanged: how many steps before this one in a row had the same argmax canvas. */
DG_HD static inline bool sampler_stop(const dg_sampling *s, int32_t unchanged, float mean_entropy) {
    switch (s->sampler) {
    default:
#define DG_SAMPLER(ID, name, temperature, accept, stop, help) \
    case DG_SAMPLER_##ID: return stop(s, unchanged, mean_entropy);
#include "samplers.def"
#undef DG_SAMPLER
    }
}

/* How long a canvas's mean entropy has been without a clear new low. */
typedef struct sampler_low {
    float mean;
    int32_t steps; /* since */
} sampler_low;
/* Counts a step, the first with index 0; true where the canvas is to be given up. */
bool sampler_plateau(const dg_sampling *s, int32_t index, float mean_entropy, sampler_low *low);

#endif
