/* The planner for RAM and VRAM. It only calculates, for this machine or for one that is described by numbers.
 *
 * The model of time: Layers run one after the other. In each layer, the work that is not experts comes first (serial).
 * Then all queues work on the layer's experts at the same time, and the slowest queue determines the time. Reading from
 * the disk and copying to the GPU continue during the serial part of the next layer, as far as their ring of buffers
 * has room: this is their head start. So
 *     step = serial + sum over layers of max over queues (work of the layer / rate - head start of the queue)
 * The disk's first head start in a step is longer, because the output head takes longer than a layer: the time that
 * this saves is subtracted.
 */
#ifndef DG_PLACEMENT_H
#define DG_PLACEMENT_H

#include "dg.h"

/* The bytes that a GPU has to hold besides experts, including driver and kernels. */
int64_t placement_fixed_vram(const dg_demand *d);
/* Sorts the experts of a layer by their tokens, most first; of equal ones, the lower number first: order[n]. */
void placement_order(const int64_t *tokens, int32_t n, int32_t *order);
/* The smallest possible budget of RAM, given this budget of VRAM. */
int64_t placement_least_ram(const dg_demand *d, int64_t vram);
/* GiB as refusals tell them: rounded up, so that what is told is enough. */
double placement_told(int64_t bytes);

#endif
