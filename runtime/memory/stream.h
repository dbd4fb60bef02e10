/* Streams weights that do not all fit into memory. Some stay in memory after they were read. The others are read into a
 * ring of buffers: a thread fills it ahead, in the order in which each pass needs them, layer by layer, and then from
 * the first layer again.
 *
 * An expert that stays has a fixed address; it is read when a pass first needs it. A pass begins, waits for the weights
 * of each layer that are not experts, takes the layer's experts portion by portion as they arrive, and ends. Only one
 * pass runs at a time. If a read fails, the pass ends with an error; the next pass tries again.
 */
#ifndef DG_STREAM_H
#define DG_STREAM_H

#include "ops.h"

enum {
    STREAM_MATRICES = 3, /* the most matrices of an expert */
    STREAM_PIECE = 1 << 23, /* the most bytes of one read */
};

/* The source of the bytes: os_file, or a test's own. */
typedef struct stream_reader {
    /* Reads from a part of the file, as os_file_read does. */
    int64_t (*read)(void *self, int32_t part, void *to, int64_t bytes, int64_t offset);
    /* Fails where a part of the file was changed since it was opened. */
    int (*check)(void *self, int32_t part, dg_error *error);
    /* Whether reads go through the page cache, where each byte is copied once more; NULL: never. */
    bool (*copies)(void *self, int32_t part);
    void *self; /* the first argument of these functions */
} stream_reader;

/* Bytes of a part that stay in memory: weights that are not experts. */
typedef struct stream_range {
    int32_t layer; /* the layer that needs them; -1: they are needed before the first layer */
    int32_t part;
    int64_t offset, bytes;
} stream_range;

/* One matrix of all experts of a layer, one expert after the other. */
typedef struct stream_matrix {
    int32_t part;
    int64_t offset; /* of expert 0 in the part */
    int64_t bytes; /* of one expert; 0: the layer has no such matrix */
} stream_matrix;

typedef struct stream_layout {
    int32_t n_layer, n_expert, n_parts, n_ranges;
    uint8_t *const *homes; /* [n_parts] the address for a part's first byte; whole granules, zero until written */
    const char *const *names; /* [n_parts] for messages */
    const stream_range *ranges; /* [n_ranges] */
    const stream_matrix *matrices; /* [n_layer][STREAM_MATRICES] */
} stream_layout;

typedef struct stream stream;
/* Nothing is read until a pass begins. NULL without memory. */
stream *stream_new(const stream_layout *layout, const stream_reader *reader);
/* Ends the thread. No pass may be running. */
void stream_free(stream *s);

/* From the next pass on, the experts keep[n_layer][n_expert] stay in memory, and the others are read into a ring of
 * n_slots buffers of slot_bytes bytes, at least stream_block_bytes(). Memory of experts that no longer stay is freed.
 * n_slots 0: all experts stay. */
void stream_place(stream *s, const bool *keep, int64_t slot_bytes, int32_t n_slots);
/* Most bytes of a buffer that any expert can take. */
int64_t stream_block_bytes(const stream *s);
/* Most memory that so many bytes of a file take: direct reads bring whole granules. */
int64_t stream_room(int64_t bytes);

/* [n_expert] the address of each expert's matrix, valid after stream_experts() has returned the expert. */
const uint8_t *const *stream_at(const stream *s, int32_t layer, int32_t matrix);

/* Begins a pass, after other passes have ended. layers: the number of layers whose experts this pass uses. */
void stream_begin(stream *s, int32_t layers);
/* Waits for the weights of a layer that are not experts (-1: for those before the first layer). False after a failure.
 */
bool stream_layer(stream *s, int32_t layer);
/* The feed for the operation `experts`: the experts of a layer as they arrive. experts[n]: the ones that are used. */
expert_feed stream_experts(stream *s, int32_t layer, const int32_t *experts, int64_t n);
/* Ends a pass; returns DG_OK, or the error of the pass. */
int stream_end(stream *s, dg_error *error);

/* Counts of bytes and seconds since stream_new(). */
void stream_traffic(stream *s, dg_traffic *out);

#endif
