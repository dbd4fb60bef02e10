/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): random numbers by counter, so
 * that a draw depends on what it is for and not on who makes it or when. */
#ifndef DG_RANDOM_H
#define DG_RANDOM_H

#include "blocks.h"

DG_HD static inline void philox(uint64_t key, uint32_t counter[4]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * counter[0], b = (uint64_t)0xCD9E8D57u * counter[2];
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ k0;
        counter[1] = (uint32_t)b;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ k1;
        counter[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* The two draws of a position: *u in (0, 1) and *id in [0, n_vocab). */
DG_HD static inline void random_draw(uint64_t seed, uint32_t block, uint32_t step, uint32_t position, uint32_t n_vocab,
                                     double *u, int32_t *id) {
    uint32_t counter[4] = {position, step, block, 0};
    philox(seed, counter);
    *u = ((double)counter[0] + 0.5) * (1.0 / 4294967296.0);
    *id = (int32_t)((uint64_t)counter[1] * n_vocab >> 32);
}

#endif
