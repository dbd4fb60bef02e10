/* The configuration of a model: read from the metadata of its file, and checked. */
#ifndef DG_CONFIG_H
#define DG_CONFIG_H

#include "gguf.h"

/* Reads all that a file says beside its weights: metadata.def into *out, which is zero before, and the tokenizer, which
 * is the caller's whatever the status. DG_ERROR_FORMAT where a key is missing, of a wrong kind or out of range. */
int config_read(const gguf *file, dg_config *out, dg_tokenizer **tokenizer, dg_error *error);

#endif
