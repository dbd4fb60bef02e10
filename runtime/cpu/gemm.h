/* Integer matrix products: weights stay quantised, activations are rounded to 8 or 13 bits once per matrix.
 *
 * A panel is GEMM_ROWS rows by `depth` columns of a matrix, unpacked to codes in L1 and arranged so that one vector
 * holds several rows by 4 (2 when wide) consecutive columns: the rows are the lanes, a token's values are broadcast,
 * and nothing is summed across lanes. What is unpacked once serves all tokens.
 */
#ifndef DG_GEMM_H
#define DG_GEMM_H

#include "cpu.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    GEMM_ROWS = 16,
    GEMM_REPACKED = 8,  /* rows that are interleaved in a repacked matrix */
    GEMM_DEPTH = 704,   /* most columns of a panel */
    GEMM_SUB = 32,      /* columns that share a scale of the weights, or two scales of 16 */
    GEMM_TOKENS = 1024, /* most tokens that pass a panel at a time */
    GEMM_HEAD_ROWS = 512, /* the same in the head: two canvases */
};

/* The rows of x, rounded. Column block b is [b * depth, (b + 1) * depth); within it `step` columns share a scale. */
typedef struct gemm_input {
    int64_t n, cols, depth, step;
    bool wide;
    int8_t *codes;      /* [blocks][n][depth] -127..127; wide: int16, -4064..4064 */
    float *scales;      /* [blocks][n][depth / step] */
    float *sums;        /* [blocks][n][depth / 32] of the codes */
    int16_t *sums16;    /* the same as int16 (not when wide) */
    /* [blocks][n][depth / 16] and [blocks][n][depth / 32]: what an accumulator of 16 or 32 columns starts at, so that
     * codes that are stored with an offset count as signed. Each instruction set has a form of its own. */
    int32_t *start16, *start32;
} gemm_input;

typedef struct gemm_panel { /* every array begins at a multiple of 64 bytes */
    _Alignas(64) uint8_t codes[GEMM_DEPTH * GEMM_ROWS * 2]; /* [depth / 4][rows][4]; wide: int16 [depth / 2][rows][2] */
    float d[GEMM_DEPTH / GEMM_SUB * GEMM_ROWS]; /* [1 or depth / 32][rows] scales */
    float m[GEMM_DEPTH / GEMM_SUB * GEMM_ROWS]; /* the same for minimums */
    /* [depth / 16 or 32][rows][2], each twice: K-quants' integer scales */
    int16_t scales[16 * GEMM_ROWS * 2];
    int16_t mins[4 * GEMM_ROWS * 2]; /* [depth / 64][rows][2] of two sub-blocks side by side */
    int64_t depth;
} gemm_panel;

/* One per format. K-quants have integer scales under one float32 scale per 256 columns; the others a float32 each
 * 32. */
typedef struct gemm_kernel {
    int32_t format;
    bool k_quant;
    bool wide;
    /* Columns [b * depth, (b + 1) * depth) of 16 rows; rows[r] is where row r's blocks begin. */
    void (*unpack)(gemm_panel *p, const uint8_t *const *rows, int64_t b);
    /* acc[i][0 .. 16) += panel . x[tokens[i]] over column block b, for i in [0, n); tokens NULL: i itself */
    void (*multiply)(const gemm_panel *p, const gemm_input *x, int64_t b, const int32_t *tokens, int64_t n, float *acc);
    /* Writes GEMM_REPACKED rows of so many blocks in as many bytes, so that their unpacking needs no shuffles; NULL:
     * the set has no such form. Then unpack_repacked is unpack of rows[i], where the i-th GEMM_REPACKED rows begin. */
    void (*repack)(uint8_t *to, const uint8_t *const rows[GEMM_REPACKED], int64_t blocks);
    void (*unpack_repacked)(gemm_panel *p, const uint8_t *const *rows, int64_t b);
} gemm_kernel;

/* What an instruction set provides. */
typedef struct gemm_set gemm_set;
struct gemm_set {
    const gemm_kernel *kernels;
    int32_t n_kernels;
    /* Fills block b of row i from values[depth]. Where a step holds NaN or infinity its scale does: codes cannot. */
    void (*quantise)(const gemm_input *x, int64_t b, int64_t i, const float *values);
    void (*gelu_mul)(float *y, const float *gate, const float *up, int64_t n);
    /* Three passes over the logits z of a row: the largest, NaN where one is NaN or infinity;
     * cap * tanh(z / cap) * slope in place; sums of exp(z - peak) and of that times (z - peak). */
    float (*peak)(const float *z, int64_t n);
    void (*squash)(float *z, int64_t n, float cap, float slope);
    void (*sums)(const float *z, int64_t n, float peak, float *total, float *moment);
    /* A row of a table, decoded; y[cols] += share * such a row. */
    void (*decode)(const tensor *table, int64_t row, float *values);
    void (*blend)(const tensor *table, int64_t row, float share, float *y);
};

/* A set of the kernels and functions that have these names in the file that installs it. */
#define GEMM_SET_OF_THIS_FILE                       \
    {.kernels = kernels,                            \
     .n_kernels = sizeof kernels / sizeof *kernels, \
     .quantise = quantise,                          \
     .gelu_mul = gelu_mul,                          \
     .peak = peak_of,                               \
     .squash = squash,                              \
     .sums = sums_of,                               \
     .decode = decode_row,                          \
     .blend = blend_row}

/* What one token brings to a panel. */
typedef struct gemm_token {
    const int8_t *codes;
    const float *scales, *sums;
    const int16_t *sums16;
    const int32_t *start16, *start32;
    float *acc;
} gemm_token;

static inline gemm_token gemm_token_of(const gemm_input *x, int64_t b, int64_t i, float *acc) {
    const int64_t row = b * x->n + i;
    return (gemm_token){.codes = x->codes + row * x->depth * (x->wide ? 2 : 1),
                        .scales = x->scales + row * (x->depth / x->step),
                        .sums = x->sums + row * (x->depth / 32),
                        .sums16 = x->sums16 + row * (x->depth / 32),
                        .start16 = x->start16 + row * (x->depth / 16),
                        .start32 = x->start32 + row * (x->depth / 32),
                        .acc = acc};
}

/* Sets k to the next of the tokens [i, n) and returns how many they are, at most `tile`. So many that all tiles are
 * about as large: one token alone would wait for its own sums. */
static inline int64_t gemm_next_tile(gemm_token *k, int64_t tile, const gemm_input *x, int64_t b, const int32_t *tokens,
                                     int64_t i, int64_t n, float *acc) {
    const int64_t tiles = (n - i + tile - 1) / tile, count = (n - i + tiles - 1) / tiles;
    for (int64_t t = i; t < i + count; t++) k[t - i] = gemm_token_of(x, b, tokens ? tokens[t] : t, acc + t * GEMM_ROWS);
    return count;
}

/* multiply_<name>, a gemm_kernel's multiply, of tile(count), which is for the tokens k[0 .. count): a constant, so that
 * sums stay in registers. cases: for the TILE of the file, GEMM_CASES_4 or GEMM_CASES_8. */
#define GEMM_MULTIPLY(name, tile, cases)                                                                               \
    static void multiply_##name(const gemm_panel *p, const gemm_input *x, int64_t b, const int32_t *tokens, int64_t n, \
                                float *acc) {                                                                          \
        gemm_token k[TILE];                                                                                            \
        int64_t count;                                                                                                 \
        for (int64_t i = 0; i < n; i += count) {                                                                       \
            count = gemm_next_tile(k, TILE, x, b, tokens, i, n, acc);                                                  \
            switch (count) { cases(tile) }                                                                             \
        }                                                                                                              \
    }
#define GEMM_CASE(tile, count) \
    case count: tile(count); break;
#define GEMM_CASES_4(tile) GEMM_CASE(tile, 1) GEMM_CASE(tile, 2) GEMM_CASE(tile, 3) GEMM_CASE(tile, 4)
#define GEMM_CASES_8(tile) \
    GEMM_CASES_4(tile) GEMM_CASE(tile, 5) GEMM_CASE(tile, 6) GEMM_CASE(tile, 7) GEMM_CASE(tile, 8)

/* ---- The order of a product, the same for every instruction set (gemm.c) ---- */

/* The kernel for this weight's format, or NULL. */
const gemm_kernel *gemm_kernel_for(const gemm_set *set, const tensor *w);
/* Rounds values[n][cols]; the memory is carved off *work. */
gemm_input gemm_quantise(const ops *o, const gemm_kernel *k, const float *values, int64_t n, int64_t cols, char **work);

/* Rows of a repacked matrix: whole strips, of which the last repeats the last row. */
static inline int64_t gemm_padded(int64_t rows) { return (rows + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS; }

/* GEMM_ROWS rows of a matrix, from `row` on; rows past its end repeat the last one. */
typedef struct gemm_strip {
    const tensor *w;
    int64_t expert, row;
} gemm_strip;

/* acc[i] = the 16 outputs of a strip for tokens[i]. next: the strip that this thread multiplies after it, or NULL; what
 * comes two blocks later is asked for ahead, across strips too, since a file's rows lie too far apart for the hardware
 * to guess. */
void gemm_product(const gemm_kernel *k, gemm_panel *p, const gemm_strip *s, const gemm_strip *next, const gemm_input *x,
                  const int32_t *tokens, int64_t n, float *acc);

/* A thread's scratch: a panel, the outputs of the tokens that pass it, twice, and GEMM_HEAD_ROWS rows of 256 logits. */
typedef struct gemm_scratch {
    gemm_panel *panel;
    float *acc, *other, *tile;
} gemm_scratch;
gemm_scratch gemm_scratch_for(const ops *o, int32_t thread);
enum {
    GEMM_SCRATCH_FLOATS = sizeof(gemm_panel) / sizeof(float) + 16 + 2 * GEMM_TOKENS * GEMM_ROWS + GEMM_HEAD_ROWS * 256
};

/* What ops_repack does, with memory[bytes] for the caller to release. */
int gemm_repack(const ops *o, layer *layers, int32_t n_layer, int64_t budget, uint8_t **memory, size_t *bytes,
                dg_error *error);

/* The integer ops (gemm.c, gemm_head.c), and what puts them in the place of the table's own (products.c), which then
 * serve formats without a kernel. */
void gemm_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work);
void gemm_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                  const int32_t *experts, const float *weights, int64_t n, int64_t k, const expert_feed *feed,
                  void *work);
void gemm_head(const ops *o, const head_part *parts, int32_t n_parts, const float *x, const tensor *table, int64_t n,
               float cap, void *work);
void gemm_self_condition(const ops *o, float *y, const self_cond *s, const tensor *table, int64_t n, float scale,
                         void *work, float *scratch);
void gemm_install(ops *o, const gemm_set *set);

#endif
