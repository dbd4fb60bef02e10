/* Rounding of activations for the products, once for each matrix. */
#ifndef DG_CUDA_QUANTIZE_H
#define DG_CUDA_QUANTIZE_H

#include "unpack.cuh"

/* STAGE columns of a row in int8. A stage has nine 16-byte lines, an odd number, so that 8 rows use different banks of
 * shared memory. Columns past the row's end are zero; sub-blocks that begin there are never read. */
struct alignas(LINE) quantized_stage {
    int8_t codes[STAGE]; /* -127..127 */
    union {
        float scales[STAGE_SUBS]; /* blocks of 32: of each sub-block */
        /* K-quants, one scale per 256 columns: value sums of sub-blocks as two bfloat16 that add up */
        struct {
            uint16_t high[STAGE_SUBS], low[STAGE_SUBS];
        } sums;
    };
};
static_assert(sizeof(quantized_stage) == 9 * LINE, "an odd number of lines");

struct quantized {
    quantized_stage *stages; /* [n][n_stages] */
    float *scales;         /* [n][n_stages / 2], K-quants */
    int32_t n_stages;
};

static inline int32_t stages_of(int64_t cols) { return static_cast<int32_t>((cols + STAGE - 1) / STAGE); }
static inline size_t whole_lines(size_t n) { return (n + 255) / 256 * 256; }
static inline size_t quantized_bytes(int64_t n, int64_t cols) {
    return whole_lines(static_cast<size_t>(n * stages_of(cols)) * sizeof(quantized_stage)) +
           whole_lines(static_cast<size_t>(n * (stages_of(cols) / 2)) * sizeof(float));
}
static inline quantized quantized_in(void *memory, int64_t n, int64_t cols) {
    quantized r;
    r.n_stages = stages_of(cols);
    r.stages = static_cast<quantized_stage *>(memory);
    r.scales = reinterpret_cast<float *>(static_cast<char *>(memory) +
                                         whole_lines(static_cast<size_t>(n * r.n_stages) * sizeof(quantized_stage)));
    return r;
}

/* Four values in int8, a byte each; peak: the largest of those that share the scale peak / 127. */
__device__ inline uint32_t round_four(const float (&v)[4], float peak) {
    const float by = peak > 0.0f ? 127.0f / peak : 0.0f;
    uint32_t codes = 0;
    DG_UNROLL for (int i = 0; i < 4; i++) {
        const float code = fminf(fmaxf(rintf(v[i] * by), -127.0f), 127.0f); /* by is infinite below 2^-121 */
        codes |= (static_cast<uint32_t>(static_cast<int32_t>(code)) & 255u) << 8 * i;
    }
    return codes;
}
/* The larger value, or NaN where one is NaN: a NaN in the scale reaches all results, while an int8 code would hide it.
 */
__device__ inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }
__device__ inline float peak_of(const float (&v)[4]) {
    return larger_or_nan(larger_or_nan(fabsf(v[0]), fabsf(v[1])), larger_or_nan(fabsf(v[2]), fabsf(v[3])));
}

/* Rounds the sub-block that lanes 8 i .. 8 i + 7 of a warp hold, four values each; all lanes come here. */
__device__ inline uint32_t round_sub(const float (&v)[4], float *scale) {
    float peak = peak_of(v);
    for (int mask = 4; mask > 0; mask /= 2) peak = larger_or_nan(peak, shuffle_xor(peak, mask));
    *scale = peak / 127.0f;
    return round_four(v, peak);
}

/* r = x[n][cols]; integer: for K-quants, a scale per 256 columns */
void quantize_rows(const launch &t, const quantized &r, const float *x, int64_t n, int64_t cols, bool integer);

#endif
