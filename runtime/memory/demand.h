/* Counts the memory and the operations that a model's weights need: the numbers that the planner works with. */
#ifndef DG_DEMAND_H
#define DG_DEMAND_H

#include "model.h"

/* Sets *d to what the weights ask for: without a cache, without scratch, without the process itself. */
void demand_weights(const dg_model *model, dg_demand *d);

#endif
