/* The table of formats, expanded from formats.def. */
#include "formats.h"

#include <stddef.h>

#include "encode.h"

#include "bf16.h"
#include "f16.h"
#include "f32.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"

#define DG_FORMAT(NAME, id, stem, block, encodes)                                                 \
    static void stem##_decode_blocks(const void *blocks, float *values, int64_t n_blocks) {       \
        const block_##stem *b = blocks;                                                           \
        for (int64_t i = 0; i < n_blocks; i++) stem##_decode(b + i, values + i * (block));        \
    }
#include "formats.def"
#undef DG_FORMAT

#define DG_ENCODER_0(stem) NULL
#define DG_ENCODER_1(stem) stem##_encode

static const dg_format formats[] = {
#define DG_FORMAT(NAME, id, stem, block, encodes) \
    {#NAME, id, block, sizeof(block_##stem), stem##_decode_blocks, DG_ENCODER_##encodes(stem)},
#include "formats.def"
#undef DG_FORMAT
};

int32_t dg_format_count(void) { return (int32_t)(sizeof formats / sizeof *formats); }

const dg_format *dg_format_at(int32_t i) { return i >= 0 && i < dg_format_count() ? &formats[i] : NULL; }

const dg_format *dg_format_find(int32_t id) {
    for (int32_t i = 0; i < dg_format_count(); i++)
        if (formats[i].id == id) return &formats[i];
    return NULL;
}
