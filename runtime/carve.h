/* Lays arrays out one after another in one piece of memory. */
#ifndef DG_CARVE_H
#define DG_CARVE_H

#include <stddef.h>
#include <stdint.h>

enum { CARVE_ALIGNMENT = 64 }; /* of every array, in bytes: a cache line */

static inline size_t carve_bytes(int64_t items, size_t size) {
    return ((size_t)items * size + CARVE_ALIGNMENT - 1) / CARVE_ALIGNMENT * CARVE_ALIGNMENT;
}

/* Returns the next items * size bytes of `memory` and adds them to *used. With memory NULL it returns NULL and only
 * counts. */
static inline void *carve(void *memory, size_t *used, int64_t items, size_t size) {
    void *at = memory ? (char *)memory + *used : NULL;
    *used += carve_bytes(items, size);
    return at;
}

/* Returns the next items * size bytes at *at, which there are, and moves *at behind them. */
static inline void *carve_off(char **at, int64_t items, size_t size) {
    void *here = *at;
    *at += carve_bytes(items, size);
    return here;
}

#endif
