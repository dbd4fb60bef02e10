#include "soft.h"

#include "error.h"
#include "os.h"

enum { ALIGNMENT = 64 };

static void *carve(soft *s, int64_t items, size_t size) {
    void *at = s->memory ? (char *)s->memory + s->bytes : NULL;
    s->bytes += ((size_t)items * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

static void lay_out(soft *s) {
    const int64_t n = s->n, chunks = (s->n_vocab + SOFT_CHUNK - 1) / SOFT_CHUNK, groups = (s->n_vocab + SOFT_GROUP - 1) / SOFT_GROUP;
    s->bytes = 0;
    s->z = carve(s, n * s->n_vocab, sizeof *s->z);
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

int64_t soft_bytes(int64_t n, int64_t n_vocab, int64_t d) {
    soft s = {.n = n, .n_vocab = n_vocab, .d = d};
    lay_out(&s);
    return (int64_t)s.bytes;
}

int soft_new(int64_t n, int64_t n_vocab, int64_t d, soft *s, dg_error *error) {
    *s = (soft){.n = n, .n_vocab = n_vocab, .d = d};
    lay_out(s);
    s->memory = os_reserve(s->bytes);
    if (!s->memory) return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas of %lld tokens", (long long)n);
    lay_out(s);
    return DG_OK;
}

void soft_free(soft *s) {
    os_release(s->memory, s->bytes);
    s->memory = NULL;
}
