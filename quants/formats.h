/* The table of weight formats: how values are stored in blocks, and how to read and write them. */
#ifndef DG_FORMATS_H
#define DG_FORMATS_H

#ifndef DG_CFFI
#include <stdint.h>
#endif

/* Format numbers as GGUF files store them: DG_F32 = 0, DG_Q8_0 = 8, ... */
typedef enum dg_type {
#define DG_FORMAT(NAME, id, stem, block, encodes) DG_##NAME = id,
#include "formats.def"
#undef DG_FORMAT
} dg_type;

typedef struct dg_format {
    const char *name; /* "Q4_K" */
    int32_t id;       /* number in GGUF files */
    int32_t block;    /* values per block; a row is a whole number of blocks */
    int32_t bytes;    /* bytes per block */
    /* blocks[n_blocks] -> values[n_blocks * block], float32 */
    void (*decode)(const void *blocks, float *values, int64_t n_blocks);
    /* values[n_blocks * block] -> blocks[n_blocks]; NULL where the format is only read. importance: NULL, or a positive
     * weight, around 1, for the squared error of each value */
    void (*encode)(const float *values, void *blocks, int64_t n_blocks, const float *importance);
} dg_format;

int32_t dg_format_count(void);
/* The i-th format of the list, or NULL past its end. */
const dg_format *dg_format_at(int32_t i);
/* The format with this GGUF number, or NULL. */
const dg_format *dg_format_find(int32_t id);

#endif
