#include "canvas.h"

#include "carve.h"

void canvas_lay_out(canvas_buffers *c, int32_t n, int32_t n_vocab, void *memory) {
    *c = (canvas_buffers){.n = n, .free = n, .n_vocab = n_vocab, .memory = memory};
    c->state = carve(memory, &c->bytes, 1, sizeof *c->state);
    c->argmax = carve(memory, &c->bytes, n, sizeof *c->argmax);
    c->entropy = carve(memory, &c->bytes, n, sizeof *c->entropy);
    c->accepted = carve(memory, &c->bytes, n, sizeof *c->accepted);
    c->ids = carve(memory, &c->bytes, n, sizeof *c->ids);
    c->host_bytes = c->bytes;
    c->fixed = carve(memory, &c->bytes, n, sizeof *c->fixed);
    c->pins = carve(memory, &c->bytes, n, sizeof *c->pins);
    c->random_ids = carve(memory, &c->bytes, n, sizeof *c->random_ids);
    c->u = carve(memory, &c->bytes, n, sizeof *c->u);
    c->choices = carve(memory, &c->bytes, n, sizeof *c->choices);
    c->order = carve(memory, &c->bytes, n, sizeof *c->order);
}
