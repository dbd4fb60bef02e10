/* Random material. */
#ifndef MATERIAL_H
#define MATERIAL_H

#include <math.h>
#include <stdlib.h>

#include "ops.h"
#include "self_condition.h"

static uint64_t random_state = 1;
static inline double uniform(void) { /* splitmix64 */
    uint64_t z = (random_state += 0x9E3779B97F4A7C15ull);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
}

static inline float *numbers(int64_t n, float scale) { /* bell-shaped, within 2 * scale */
    float *x = (float *)malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = scale * (float)(uniform() + uniform() + uniform() + uniform() - 2.0);
    return x;
}

/* Encoded random weights; formats that are only read get random codes under sane scales. */
static inline tensor weights(int32_t type, int64_t cols, int64_t rows, int64_t experts) {
    const dg_format *f = dg_format_find(type);
    const int64_t blocks = cols * rows * experts / f->block;
    uint8_t *data = (uint8_t *)malloc((size_t)(blocks * f->bytes));
    if (f->encode) {
        float *x = numbers(cols * rows * experts, 0.3f);
        f->encode(x, data, blocks, NULL);
        free(x);
    } else {
        for (int64_t i = 0; i < blocks * f->bytes; i++) data[i] = (uint8_t)(uniform() * 256.0);
        const int64_t at = type == DG_Q3_K ? 108 : type == DG_Q2_K ? 80 : 0; /* of d; behind it Q2_K has dmin */
        for (int64_t i = 0; i < blocks; i++)
            for (int64_t j = at; j < (type == DG_Q2_K ? at + 4 : at + 2); j += 2)
                data[i * f->bytes + j] = 0, data[i * f->bytes + j + 1] = 0x14; /* 2^-10 */
    }
    const int64_t row = cols / f->block * f->bytes;
    return (tensor){f, data, cols, rows, experts, row, row * rows, NULL, 0, NULL, 0, NULL};
}

/* Room of the head op, with whole logits. */
static inline self_cond self_cond_new(int64_t n, int64_t n_vocab, int64_t d) {
    self_cond s;
    self_cond_lay_out(&s, n, n_vocab, d, true, NULL);
    self_cond_lay_out(&s, n, n_vocab, d, true, os_reserve(s.bytes));
    return s;
}
static inline void self_cond_free(self_cond *s) { os_release(s->memory, s->bytes); }

static inline double error_of(const float *a, const float *b,
                              int64_t n) { /* largest difference, in parts of the largest number */
    double worst = 0.0, scale = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        scale = fmax(scale, fabs((double)b[i]));
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    }
    return worst / scale;
}

#endif
