/* The formats, under the sanitizers: blocks of exactly their size, values of every kind, how near they come back. */
#include "formats.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { MOST = 256 * 7 };

static uint64_t state = 1;

/* -1 to 1, evenly. */
static float uniform(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / 8388608.0f - 1.0f;
}

/* Encodes and decodes n blocks through buffers of exactly their size, twice, and checks that the bytes are the same. */
static void round_trip(const dg_format *f, const float *values, float *back, int64_t n) {
    const size_t bytes = (size_t)(n * f->bytes), value_bytes = (size_t)(n * f->block) * sizeof(float);
    void *blocks = malloc(bytes), *again = malloc(bytes);
    float *in = malloc(value_bytes), *out = malloc(value_bytes);
    memcpy(in, values, value_bytes);
    memset(blocks, 0xaa, bytes);
    memset(again, 0x55, bytes);
    f->encode(in, blocks, n, NULL);
    f->encode(in, again, n, NULL);
    CHECK(memcmp(blocks, again, bytes) == 0, "%s: %d blocks, two results", f->name, (int)n);
    float *importance = malloc(value_bytes);
    for (int64_t i = 0; i < n * f->block; i++) importance[i] = 0.5f + (float)(i % 5);
    f->encode(in, again, n, importance);
    float *mean = malloc(value_bytes);
    for (int64_t i = 0; i < n * f->block; i++) mean[i] = 0.25f * (float)(i % 7 - 3);
    const dg_columns columns = {importance, mean, mean};
    dg_encode_rows(f, in, again, 1, n * f->block, &columns);
    dg_encode_rows(f, in, again, n, f->block, &columns);
    free(mean);
    free(importance);
    f->decode(blocks, out, n);
    memcpy(back, out, value_bytes);
    free(blocks);
    free(again);
    free(in);
    free(out);
}

/* Relative RMSE that evenly spread values must not exceed. */
static double allowed(const dg_format *f) {
    switch (f->id) {
    case DG_F32: return 0.0;
    case DG_F16: return 0.0003;
    case DG_BF16: return 0.0025;
    case DG_Q8_0: return 0.006;
    case DG_Q6_K: return 0.015;
    case DG_Q5_K:
    case DG_Q5_1:
    case DG_Q5_0: return 0.04;
    default: return 0.08;
    }
}

static void table(void) {
    CHECK(dg_format_at(-1) == NULL && dg_format_at(dg_format_count()) == NULL, "past the ends");
    CHECK(dg_format_find(-1) == NULL && dg_format_find(9999) == NULL, "numbers that no format has");
    for (int i = 0; i < dg_format_count(); i++) {
        const dg_format *f = dg_format_at(i);
        CHECK(dg_format_find(f->id) == f, "%s: its number finds another", f->name);
        CHECK(f->block == 1 || f->block == 32 || f->block == 256, "%s: block %d", f->name, f->block);
        CHECK(f->bytes > 0 && f->bytes <= 4 * f->block, "%s: %d bytes", f->name, f->bytes);
    }
}

static void arbitrary_bytes(const dg_format *f) {
    for (int64_t n = 0; n <= 65; n += 5) {
        const size_t bytes = (size_t)(n * f->bytes);
        uint8_t *blocks = malloc(bytes);
        float *values = malloc((size_t)(n * f->block) * sizeof *values);
        for (size_t i = 0; i < bytes; i++) blocks[i] = (uint8_t)((int)(uniform() * 128.0f) & 255);
        f->decode(blocks, values, n);
        free(blocks);
        free(values);
    }
}

static void ordinary_values(const dg_format *f) {
    static float values[MOST], back[MOST];
    for (float size = 1e-2f; size < 1e5f; size *= 8.0f)
        for (int64_t n = 1; n * f->block <= MOST && n <= 7; n += 2) {
            double error = 0.0, power = 0.0;
            for (int64_t i = 0; i < n * f->block; i++) values[i] = size * uniform();
            if (f->block == 1) values[0] = size;
            round_trip(f, values, back, n);
            for (int64_t i = 0; i < n * f->block; i++) {
                error += ((double)back[i] - values[i]) * ((double)back[i] - values[i]);
                power += (double)values[i] * values[i];
            }
            const double relative = sqrt(error / power);
            CHECK(relative <= allowed(f), "%s: %d blocks of size %g: error %g", f->name, (int)n, size, relative);
        }
}

static void odd_values(const dg_format *f) {
    static const float odd[] = {0.0f,    -0.0f,    1.0f,      -1.0f,   FLT_MAX, -FLT_MAX, FLT_MIN,  -FLT_MIN, 1e-45f,
                                -1e-45f, INFINITY, -INFINITY, NAN,     -NAN,    65504.0f, 65520.0f, 1e-7f,    3e-8f,
                                1e9f,    -1e9f,    1e20f,     -1e-20f, 0.5f,    127.5f,   2.5f,     4e-39f,   -6e4f};
    enum { N = sizeof odd / sizeof *odd };
    static float values[MOST], back[MOST];
    const int64_t n = f->block == 1 ? MOST : MOST / f->block;
    for (int k = 0; k < N; k++) {
        for (int i = 0; i < MOST; i++) values[i] = odd[k]; /* all the same */
        round_trip(f, values, back, n);
        for (int i = 0; odd[k] == 0.0f && i < MOST; i++) CHECK(back[i] == 0.0f, "%s: zero became %g", f->name, back[i]);
        for (int i = 0; i < MOST; i++) values[i] = i % 37 == 0 ? odd[k] : uniform(); /* a few */
        round_trip(f, values, back, n);
        for (int i = 0; i < MOST; i++) values[i] = odd[k] * uniform(); /* of that size */
        round_trip(f, values, back, n);
    }
    for (int round = 0; round < 200; round++) {
        for (int i = 0; i < MOST; i++) {
            values[i] = odd[(int)((uniform() + 1.0f) * 0.5f * N) % N];
            if (round % 2 == 1) { /* any bits */
                const uint32_t bits = (uint32_t)(int32_t)(uniform() * 2147483520.0f);
                memcpy(values + i, &bits, sizeof bits);
            }
        }
        round_trip(f, values, back, n);
    }
}

int main(void) {
    table();
    for (int i = 0; i < dg_format_count(); i++) {
        const dg_format *f = dg_format_at(i);
        arbitrary_bytes(f);
        if (f->encode == NULL) continue;
        ordinary_values(f);
        odd_values(f);
    }
    return check_done("quants");
}
