/* Blocks of any bytes decode, and any numbers encode, by themselves or as rows whose inputs have means: one format at a
 * time, the first byte says which. */
#include <math.h>
#include <string.h>

#include "formats.h"
#include "fuzz.h"

/* Decoding is of each block alone. */
static void check_decode(const dg_format *f, const uint8_t *data, int64_t n) {
    const size_t values = (size_t)(n * f->block), bytes = (size_t)(n * f->bytes);
    void *blocks = malloc(bytes ? bytes : 1);
    float *all = malloc((values ? values : 1) * sizeof *all), *one = malloc((size_t)f->block * sizeof *one);
    memcpy(blocks, data, bytes);
    f->decode(blocks, all, n);
    for (int64_t i = 0; i < n; i++) {
        f->decode((const char *)blocks + i * f->bytes, one, 1);
        MUST(memcmp(one, all + i * f->block, (size_t)f->block * sizeof *one) == 0, "%s: block %lld", f->name,
             (long long)i);
    }
    free(blocks), free(all), free(one);
}

/* What was encoded of numbers of a sane size decodes to such numbers. */
static void check_encode(const dg_format *f, const uint8_t *data, int64_t n, bool weighted) {
    const size_t count = (size_t)(n * f->block);
    float *values = malloc((count ? count : 1) * sizeof *values),
          *weights = malloc((count ? count : 1) * sizeof *weights);
    void *blocks = malloc((size_t)(n * f->bytes + 1));
    memcpy(values, data, count * sizeof *values);
    bool sane = true;
    for (size_t i = 0; i < count; i++) {
        sane = sane && fabsf(values[i]) < 1000.0f;
        weights[i] = 0.5f + (float)data[i] / 256.0f;
    }
    f->encode(values, blocks, n, weighted ? weights : NULL);
    f->decode(blocks, values, n);
    for (size_t i = 0; i < count && sane; i++)
        MUST(fabsf(values[i]) < 4000.0f, "%s: value %zu is %g", f->name, i, (double)values[i]);
    free(values), free(weights), free(blocks);
}

/* A row does not depend on those beside it. */
static void check_rows(const dg_format *f, const uint8_t *data, int64_t n) {
    enum { COLUMNS = 512, MOST_ROWS = 9 };
    const int64_t rows = n / (4 * COLUMNS) < MOST_ROWS ? n / (4 * COLUMNS) : MOST_ROWS,
                  bytes = COLUMNS / f->block * f->bytes;
    static float values[MOST_ROWS * COLUMNS], weights[COLUMNS], mean[COLUMNS], pull[COLUMNS];
    memcpy(values, data, (size_t)(rows * COLUMNS * 4));
    for (int64_t j = 0; j < COLUMNS && rows; j++) {
        const int byte = data[j];
        weights[j] = 0.5f + (float)byte / 256.0f;
        mean[j] = (float)(byte - 100) / 64.0f;
        pull[j] = byte % 3 ? mean[j] * (float)byte : 0.0f;
    }
    const dg_columns of = {weights, mean, pull};
    uint8_t *all = malloc((size_t)(rows * bytes + 1)), *one = malloc((size_t)bytes);
    dg_encode_rows(f, values, all, rows, COLUMNS, &of);
    for (int64_t r = 0; r < rows; r++) {
        dg_encode_rows(f, values + r * COLUMNS, one, 1, COLUMNS, &of);
        MUST(memcmp(one, all + r * bytes, (size_t)bytes) == 0, "%s: row %lld", f->name, (long long)r);
    }
    free(all), free(one);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n == 0) return 0;
    const dg_format *f = dg_format_at((data[0] >> 2) % dg_format_count());
    const bool encode = data[0] & 1, weighted = data[0] & 2;
    MUST(dg_format_find(f->id) == f && !dg_format_find(-1), "%s: its number", f->name);
    if (!encode) check_decode(f, data + 1, (int64_t)(n - 1) / f->bytes);
    else if (f->encode && weighted && n > 4 * 512 && f->block > 1) check_rows(f, data + 1, (int64_t)n - 1);
    else if (f->encode) check_encode(f, data + 1, (int64_t)(n - 1) / (4 * f->block), weighted);
    return 0;
}
