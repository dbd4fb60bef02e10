/* The tables of formats, expanded from formats.def and unread.def. */
#include "formats.h"

#include <stdbool.h>
#include <stddef.h>

#include "blocks.h"
#include "encode.h"
#include "tiny.h"

#include "decoders.h"

/* Whether a block's values, as they decode, are worse than zeros: by the errors, or by far too large ones. */
static bool worse_than_zeros(const float *decoded, const float *values, const float *importance, int32_t n) {
    double errors = 0.0, squares = 0.0;
    for (int32_t i = 0; i < n; i++) {
        const double weight = (double)importance[i], value = (double)values[i];
        const double error = (double)decoded[i] - value;
        errors += weight * error * error;
        squares += weight * value * value;
    }
    return errors > squares || far_too_large(decoded, n, largest(values, n));
}

typedef void encoder(const float *values, void *blocks, int64_t n_blocks, const float *importance);

/* Blocks of tiny values that are worse than zeros become zeros, where errors have weights: without, formats are
 * written as GGML writes them. */
static void keep_tiny(const dg_format *f, encoder *encode, const float *values, uint8_t *blocks, int64_t n_blocks,
                      const float *importance) {
    enum { MOST_BLOCK = 256 };
    static const float zeros[MOST_BLOCK];
    float decoded[MOST_BLOCK];
    for (int64_t b = 0; importance && f->block > 1 && b < n_blocks; b++) {
        const float *of = values + b * f->block;
        uint8_t *block = blocks + b * f->bytes;
        if (largest(of, f->block) >= TINY) continue;
        f->decode(block, decoded, 1);
        if (worse_than_zeros(decoded, of, importance + b * f->block, f->block)) encode(zeros, block, 1, NULL);
    }
}

/* Each format's place in the table. */
enum {
#define DG_FORMAT(NAME, id, stem, block, encodes) AT_##NAME,
#include "formats.def"
#undef DG_FORMAT
    FORMATS
};
static const dg_format formats[FORMATS];

#define DG_ENCODER_0(stem) NULL
#define DG_ENCODER_1(stem) stem##_keeping
#define DG_KEEPING_0(stem, at)
#define DG_KEEPING_1(stem, at)                                                                                 \
    static void stem##_keeping(const float *values, void *blocks, int64_t n_blocks, const float *importance) { \
        stem##_encode(values, blocks, n_blocks, importance);                                                   \
        keep_tiny(&formats[at], stem##_encode, values, blocks, n_blocks, importance);                          \
    }
#define DG_FORMAT(NAME, id, stem, block, encodes) DG_KEEPING_##encodes(stem, AT_##NAME)
#include "formats.def"
#undef DG_FORMAT

static const dg_format formats[FORMATS] = {
#define DG_FORMAT(NAME, number, stem, per_block, encodes) \
    {                                                     \
        .name = #NAME,                                    \
        .id = number,                                     \
        .block = per_block,                               \
        .bytes = sizeof(block_##stem),                    \
        .decode = stem##_decode_blocks,                   \
        .encode = DG_ENCODER_##encodes(stem),             \
    },
#include "formats.def"
#undef DG_FORMAT
};

static const dg_format unread[] = {
#define DG_UNREAD(NAME, number, per_block, size) {.name = #NAME, .id = number, .block = per_block, .bytes = size},
#include "unread.def"
#undef DG_UNREAD
};

int32_t dg_format_count(void) { return FORMATS; }

const dg_format *dg_format_at(int32_t i) { return i >= 0 && i < dg_format_count() ? &formats[i] : NULL; }

const dg_format *dg_format_find(int32_t id) {
    for (int32_t i = 0; i < dg_format_count(); i++)
        if (formats[i].id == id) return &formats[i];
    return NULL;
}

int64_t dg_first_not_finite(const dg_format *f, const void *blocks, int64_t n_blocks) {
    enum { AT_ONCE = 1024 };
    float values[AT_ONCE];
    const int64_t most = AT_ONCE / f->block;
    for (int64_t b = 0; b < n_blocks; b += most) {
        const int64_t n = n_blocks - b < most ? n_blocks - b : most;
        f->decode((const uint8_t *)blocks + b * f->bytes, values, n);
        uint32_t found = 0; /* one pass that vectorises, and a second where it is needed */
        for (int64_t i = 0; i < n * f->block; i++)
            found |= (uint32_t)((float_to_bits(values[i]) & 0x7f800000u) == 0x7f800000u);
        for (int64_t i = 0; found && i < n * f->block; i++)
            if ((float_to_bits(values[i]) & 0x7f800000u) == 0x7f800000u) return b * f->block + i;
    }
    return -1;
}

const dg_format *dg_type_find(int32_t id) {
    for (size_t i = 0; i < sizeof unread / sizeof *unread; i++)
        if (unread[i].id == id) return &unread[i];
    return dg_format_find(id);
}
