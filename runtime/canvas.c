#include "canvas.h"

enum { ALIGNMENT = 64 };

static void *carve(canvas_room *c, int32_t items, size_t size) {
    void *at = c->memory ? (char *)c->memory + c->bytes : NULL;
    c->bytes += ((size_t)items * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

void canvas_lay_out(canvas_room *c, int32_t n, int32_t n_vocab, void *memory) {
    *c = (canvas_room){.n = n, .free = n, .n_vocab = n_vocab, .memory = memory};
    c->state = carve(c, 1, sizeof *c->state);
    c->argmax = carve(c, n, sizeof *c->argmax);
    c->entropy = carve(c, n, sizeof *c->entropy);
    c->accepted = carve(c, n, sizeof *c->accepted);
    c->ids = carve(c, n, sizeof *c->ids);
    c->told = c->bytes;
    c->fixed = carve(c, n, sizeof *c->fixed);
    c->pins = carve(c, n, sizeof *c->pins);
    c->random_ids = carve(c, n, sizeof *c->random_ids);
    c->u = carve(c, n, sizeof *c->u);
    c->choices = carve(c, n, sizeof *c->choices);
    c->order = carve(c, 2 * n, sizeof *c->order);
}
