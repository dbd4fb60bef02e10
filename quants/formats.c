/* The tables of formats, expanded from formats.def and unread.def. */
#include "formats.h"

#include <stddef.h>

#include "blocks.h"
#include "encode.h"

#include "decoders.h"

#define DG_ENCODER_0(stem) NULL
#define DG_ENCODER_1(stem) stem##_encode

static const dg_format formats[] = {
#define DG_FORMAT(NAME, id, stem, block, encodes) \
    {#NAME, id, block, sizeof(block_##stem), stem##_decode_blocks, DG_ENCODER_##encodes(stem)},
#include "formats.def"
#undef DG_FORMAT
};

static const dg_format unread[] = {
#define DG_UNREAD(NAME, id, block, bytes) {#NAME, id, block, bytes, NULL, NULL},
#include "unread.def"
#undef DG_UNREAD
};

int32_t dg_format_count(void) { return (int32_t)(sizeof formats / sizeof *formats); }

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
        for (int64_t i = 0; i < n * f->block; i++) found |= (uint32_t)((float_to_bits(values[i]) & 0x7f800000u) == 0x7f800000u);
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
