/* The table of weight formats: sizes of blocks, and functions that decode and encode them. */
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
    /* blocks[n_blocks] -> values[n_blocks * block], float32; NULL in dg_type_find's alone, where the type is not
     * read */
    void (*decode)(const void *blocks, float *values, int64_t n_blocks);
    /* values[n_blocks * block] -> blocks[n_blocks]; NULL where the format is only read. importance: NULL, or a positive
     * weight, around 1, for the squared error of each value. A block with a value beyond what the format holds decodes
     * to at least one that is not finite: see dg_first_not_finite */
    void (*encode)(const float *values, void *blocks, int64_t n_blocks, const float *importance);
} dg_format;

int32_t dg_format_count(void);
/* The i-th format of the list, or NULL past its end. */
const dg_format *dg_format_at(int32_t i);
/* The format with this GGUF number, or NULL. */
const dg_format *dg_format_find(int32_t id);
/* The same for every type that GGUF files are known to have, those of unread.def among them. */
const dg_format *dg_type_find(int32_t id);

/* The number of the first value of the blocks that is infinite or NaN, or -1. */
int64_t dg_first_not_finite(const dg_format *f, const void *blocks, int64_t n_blocks);

/* Statistics of a matrix's inputs, for each column. */
typedef struct dg_columns {
    const float *importance; /* as an encoder takes it */
    const float *mean;
    /* mean / variance, of one sign with the mean or 0: how much of other columns' errors it takes up */
    const float *pull;
} dg_columns;
/* Encodes values[n_rows][n_cols] as f->encode does, and chooses the errors of a row so that they nearly cancel out in
 * its product with the columns' means. f must encode; n_cols is a whole number of blocks. The result of a row does not
 * depend on other rows. */
void dg_encode_rows(const dg_format *f, const float *values, void *blocks, int64_t n_rows, int64_t n_cols,
                    const dg_columns *of);

#endif
