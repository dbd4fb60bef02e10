/* The lists of this folder (*.def) as C tables, for the runtime itself. */
#ifndef DG_LISTS_H
#define DG_LISTS_H

#include "dg.h"

/* The GGUF key of each field of metadata.def: KEY_n_layer, KEY_tokens, ... */
typedef enum key_id {
#define DG_REQUIRED_KEY(kind, field, key) KEY_##field,
#define DG_KEY(kind, field, key, absent) KEY_##field,
#define DG_LAYER_KEY(kind, field, key) KEY_##field,
#define DG_TEXT(kind, field, key) KEY_##field,
#include "metadata.def"
    KEY_COUNT
} key_id;

static inline const char *key_name(key_id id) { return dg_key_at((int32_t)id)->key; }

#endif
