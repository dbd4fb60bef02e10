#include "self_condition.h"

#include "carve.h"

void self_cond_lay_out(self_cond *s, int64_t n, int64_t n_vocab, int64_t d, bool whole_logits, void *memory) {
    *s = (self_cond){.n = n, .n_vocab = n_vocab, .d = d, .memory = memory};
    const int64_t chunks = (n_vocab + SELF_COND_CHUNK - 1) / SELF_COND_CHUNK,
                  groups = (n_vocab + SELF_COND_GROUP - 1) / SELF_COND_GROUP;
    const int64_t wide = whole_logits ? n_vocab : n_vocab < SELF_COND_STRETCH ? n_vocab : SELF_COND_STRETCH;
    s->z = carve(memory, &s->bytes, n * (wide > SELF_COND_CHUNK ? wide : SELF_COND_CHUNK), sizeof *s->z);
    s->x = carve(memory, &s->bytes, n * s->d, sizeof *s->x);
    s->argmax = carve(memory, &s->bytes, n, sizeof *s->argmax);
    s->floors = carve(memory, &s->bytes, n, sizeof *s->floors);
    s->parts = carve(memory, &s->bytes, chunks * n, sizeof *s->parts);
    s->lists = carve(memory, &s->bytes, groups * n, sizeof *s->lists);
    s->counts = carve(memory, &s->bytes, n, sizeof *s->counts);
    s->ids = carve(memory, &s->bytes, n * SELF_COND_IDS, sizeof *s->ids);
    s->shares = carve(memory, &s->bytes, n * SELF_COND_IDS, sizeof *s->shares);
    s->dropped = carve(memory, &s->bytes, n, sizeof *s->dropped);
    s->chunks = carve(memory, &s->bytes, n, sizeof *s->chunks);
    s->aims = carve(memory, &s->bytes, n, sizeof *s->aims);
}
