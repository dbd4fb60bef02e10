/* Recognises GGUF files with a model that this runtime can run. */
#ifndef DG_GGUF_KIND_H
#define DG_GGUF_KIND_H

#include "gguf.h"

/* Refuses a GGUF file that holds something else than a diffusion-gemma model, by its metadata and its first tensor's
 * name. */
int gguf_kind_check(const gguf *file, dg_error *error);

#endif
