/* Weights that are not all in memory: some stay once they were read, the rest comes through a ring of buffers that
 * one thread fills ahead, in the order in which every pass needs it: layer after layer, and then the first again.
 *
 * An expert that stays in memory has a fixed address; it is read when a pass first needs it. A pass begins, waits for
 * each layer's own weights, takes that layer's experts portion by portion as they arrive, and ends; passes take turns.
 * A read that fails ends the pass with an error; the next one tries again.
 */
#ifndef DG_STREAM_H
#define DG_STREAM_H

#include "ops.h"

enum { STREAM_MATRICES = 3, STREAM_PIECE = 1 << 23 }; /* of an expert, at most; bytes of one read */

/* Where the bytes come from: os_file, or what a test puts there. */
typedef struct stream_reader {
    /* As os_file_read, of one of the file's parts. */
    int64_t (*read)(void *self, int32_t part, void *to, int64_t bytes, int64_t offset);
    /* Whether it is still what it was: a status and a message. */
    int (*check)(void *self, int32_t part, dg_error *error);
    /* Whether reads go through the page cache, where each byte is copied once more; NULL: never. */
    bool (*copies)(void *self, int32_t part);
    void *self;
} stream_reader;

/* Bytes of a part that stay. layer -1: needed before the first layer. */
typedef struct stream_range {
    int32_t layer, part;
    int64_t offset, bytes;
} stream_range;

/* A layer's matrices of all experts, one after another, `bytes` each; 0: there is none. */
typedef struct stream_matrix {
    int32_t part;
    int64_t offset, bytes;
} stream_matrix;

typedef struct stream_layout {
    int32_t n_layer, n_expert, n_parts, n_ranges;
    uint8_t *const *homes;       /* [n_parts] where a part's first byte belongs; whole granules, zero until written */
    const char *const *names;    /* [n_parts] for messages */
    const stream_range *ranges;  /* [n_ranges] */
    const stream_matrix *matrices; /* [n_layer][STREAM_MATRICES] */
} stream_layout;

typedef struct stream stream;
/* Nothing is read until a pass begins. NULL without memory. */
stream *stream_new(const stream_layout *layout, const stream_reader *reader);
/* Ends the thread. No pass may be running. */
void stream_free(stream *s);

/* From the next pass on these experts stay, keep[n_layer][n_expert], and the others come through a ring of n_slots
 * buffers of slot_bytes, each at least stream_block_bytes(). Memory of those that stayed before is given back.
 * n_slots 0: all stay. */
void stream_place(stream *s, const bool *keep, int64_t slot_bytes, int32_t n_slots);
/* Most bytes of a buffer that any expert can take. */
int64_t stream_block_bytes(const stream *s);
/* Most memory that so many bytes of a file take: direct reads bring whole granules. */
int64_t stream_room(int64_t bytes);

/* [n_expert] where each expert's matrix lies once it was handed out. */
const uint8_t *const *stream_at(const stream *s, int32_t layer, int32_t matrix);

/* Waits for its turn. layers: how many of the model's have their experts used in this pass. */
void stream_begin(stream *s, int32_t layers);
/* Waits for a layer's own weights (-1: for those before the first). False after a failure. */
bool stream_layer(stream *s, int32_t layer);
/* Experts of this layer, of which experts[n] are used: the feed of the experts op. */
expert_feed stream_experts(stream *s, int32_t layer, const int32_t *experts, int64_t n);
/* Ends the turn; DG_OK, or what failed in this pass. */
int stream_end(stream *s, dg_error *error);

/* Since the stream began. */
void stream_traffic(stream *s, dg_traffic *out);

#endif
