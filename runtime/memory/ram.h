/* Decides how much memory a model may hold: what was asked for, or what there is. */
#ifndef DG_MEMORY_RAM_H
#define DG_MEMORY_RAM_H

#include "model.h"

/* Sets *out; `asked` is dg_model_options.ram. DG_ERROR_MEMORY for more than there is. */
int ram_decide(const dg_model *model, int64_t asked, dg_ram *out, dg_error *error);

#endif
