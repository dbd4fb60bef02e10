/* The one planner of RAM and VRAM: pure arithmetic, for machines that are there and for those that are described.
 *
 * The model of time. Layers follow one another: first what is not experts (serial), then a layer's experts, when all
 * queues work at once and the slowest decides. Copies from disk and to the GPU run on through the serial part of the
 * next layer as far as their ring of buffers is deep. So
 *     step = serial + sum over layers of max over queues (work of the layer / rate - head start of the queue)
 * less what the disk's first head start is longer than the others, as the output head takes longer than a layer.
 */
#ifndef DG_PLACEMENT_H
#define DG_PLACEMENT_H

#include "dg.h"

/* What a GPU has to hold beside experts, with driver and kernels. */
int64_t placement_fixed_vram(const dg_demand *d);
/* order[n] = a layer's experts, those of most tokens first, the lower number first among equals. */
void placement_order(const int64_t *tokens, int32_t n, int32_t *order);
/* The smallest budget of RAM beside this one of VRAM. */
int64_t placement_least_ram(const dg_demand *d, int64_t vram);
/* GiB as refusals tell them: rounded up, so that what is told is enough. */
double placement_told(int64_t bytes);

#endif
