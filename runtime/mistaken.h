/* What is given in a model's place: each is told for what it is, and what to do with it. */
#ifndef DG_MISTAKEN_H
#define DG_MISTAKEN_H

#include "gguf.h"

/* Refuses a file that is no GGUF, by how it begins. Returns DG_ERROR_FORMAT. */
int mistaken_bytes(const gguf *file, dg_error *error);
/* Refuses a GGUF file that holds something else than a diffusion-gemma model, by its metadata and tensors' names. */
int mistaken_kind(const gguf *file, dg_error *error);

#endif
