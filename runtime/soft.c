#include "soft.h"

enum { ALIGNMENT = 64 };

static void *carve(soft *s, int64_t items, size_t size) {
    void *at = s->memory ? (char *)s->memory + s->bytes : NULL;
    s->bytes += ((size_t)items * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

void soft_lay_out(soft *s, int64_t n, int64_t n_vocab, int64_t d, bool whole_logits, void *memory) {
    *s = (soft){.n = n, .n_vocab = n_vocab, .d = d, .memory = memory};
    const int64_t chunks = (n_vocab + SOFT_CHUNK - 1) / SOFT_CHUNK, groups = (n_vocab + SOFT_GROUP - 1) / SOFT_GROUP;
    const int64_t wide = whole_logits ? n_vocab : n_vocab < SOFT_STRETCH ? n_vocab : SOFT_STRETCH;
    s->z = carve(s, n * (wide > SOFT_CHUNK ? wide : SOFT_CHUNK), sizeof *s->z);
    s->x = carve(s, n * s->d, sizeof *s->x);
    s->argmax = carve(s, n, sizeof *s->argmax);
    s->floors = carve(s, n, sizeof *s->floors);
    s->parts = carve(s, chunks * n, sizeof *s->parts);
    s->lists = carve(s, groups * n, sizeof *s->lists);
    s->counts = carve(s, n, sizeof *s->counts);
    s->ids = carve(s, n * SOFT_IDS, sizeof *s->ids);
    s->shares = carve(s, n * SOFT_IDS, sizeof *s->shares);
    s->dropped = carve(s, n, sizeof *s->dropped);
    s->chunks = carve(s, n, sizeof *s->chunks);
    s->aims = carve(s, n, sizeof *s->aims);
}
