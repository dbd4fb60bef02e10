/* A model's memory under a budget: what sessions take of it, and what that leaves to weights. */
#ifndef DG_BUDGET_H
#define DG_BUDGET_H

#include "model.h"

typedef struct budget budget;

/* Takes the model's weights over: from here on nothing but the header is read through the map, and all that the process
 * holds stays within `ram` bytes. DG_ERROR_MEMORY, with the least that would do, where that cannot be. */
int budget_open(dg_model *model, int64_t ram, dg_error *error);
void budget_free(dg_model *model);

/* Memory for `what`, of the process or, where a device computes, of it; such as "a session of 100 tokens": weights make
 * room for it. Without a budget it is of what is free now, and a refusal tells the `parts` too. */
int budget_take(dg_model *model, int64_t bytes, const char *what, const char *parts, dg_error *error);
void budget_give(dg_model *model, int64_t bytes);
/* The longest session of at most this many tokens that there is room for; at least 1. */
int32_t budget_context(const dg_model *model, int32_t most);

/* Bytes that further sessions can take; 0 where the system does not tell. */
int64_t budget_room(const dg_model *model);

/* As dg_model_placed, dg_model_prefer and dg_model_traffic. */
bool budget_placed(const dg_model *model, dg_plan *plan);
void budget_prefer(dg_model *model, const int64_t *tokens);
bool budget_traffic(const dg_model *model, dg_traffic *out);

#endif
