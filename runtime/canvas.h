/* A canvas while it settles, in the memory that operations work in: the ops canvas_draw, head and canvas_step take
 * it through a step without asking the host. */
#ifndef DG_CANVAS_H
#define DG_CANVAS_H

#include "dg.h"

typedef struct canvas_state {
    uint64_t seed;
    int32_t block;       /* canvases finished before this one */
    int32_t index;       /* of the step that is next */
    int32_t unchanged;   /* steps in a row whose argmax was the last one's */
    int32_t converged;   /* the last step's stop test held */
    float temperature;   /* of the step that is on, or of the last one */
    float mean_entropy;  /* of the last step */
} canvas_state;

typedef struct canvas_buffers {
    int32_t n, n_vocab;
    int32_t free;        /* positions that are not pinned; n: there are no pins */
    canvas_state *state;
    int32_t *argmax;     /* [n] of the last step */
    float *entropy;      /* [n] */
    bool *accepted;      /* [n] */
    int32_t *ids;        /* [n] what the decoder sees next */
    size_t host_bytes;   /* of the five above, which lie side by side: what the host copies after each step */
    bool *fixed;         /* [n] positions that stay as they are from here on: pins, and what is final */
    bool *pins;          /* [n] positions whose ids stay as they are, where there are pins */
    int32_t *random_ids; /* [n] of the step */
    double *u;           /* [n] */
    dg_choice *choices;  /* [n] */
    int32_t *order;      /* [n] positions in the order of entropy */
    size_t bytes;
    void *memory;
} canvas_buffers;

/* Lays the arrays out in `memory`, which may be NULL: then c->bytes says how much they need. */
void canvas_lay_out(canvas_buffers *c, int32_t n, int32_t n_vocab, void *memory);

#endif
