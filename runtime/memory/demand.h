/* Counts the memory and the operations that a model's weights need: the numbers that the planner works with. */
#ifndef DG_DEMAND_H
#define DG_DEMAND_H

#include "model.h"

/* Bytes that the next process may hold more than this one, or find free less: a least that is told has them. */
enum { DEMAND_VARIES = 16 << 20 };

/* Sets *d to what the weights ask for, without a cache and scratch. direct: with what direct reads bring beside them,
 * as under a budget of RAM. */
void demand_weights(const dg_model *model, bool direct, dg_demand *d);
/* The same with a session of `context` tokens, and what threads work in. Budgets and plans are made of it. */
void demand_session(const dg_model *model, int32_t context, bool direct, dg_demand *d);
/* The context of that session where nobody says one. */
int32_t demand_context(const dg_model *model);
/* Returns the bytes that the process takes beside weights and sessions. held: what it holds now. */
int64_t demand_process(const dg_model *model, int64_t held);

/* The layer that a tensor's name tells, or -1. */
int32_t demand_layer(const gguf_tensor *t);
/* Whether a tensor stays in memory under every budget: it is of the layers that run, and not of experts. */
bool demand_stays(const dg_model *model, const gguf_tensor *t);

#endif
