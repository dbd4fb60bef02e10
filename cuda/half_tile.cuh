/* A tile of a product with bfloat16 or binary16 weights: as in tile.cuh, but weights and activations have 16 bits.
 *
 * Each row of activations is scaled by a power of two, which is exact, so that its values fit into binary16; then they
 * are rounded to the weights' type. Rows must consist of whole lines: the columns must be a multiple of 8.
 */
#ifndef DG_CUDA_HALF_TILE_H
#define DG_CUDA_HALF_TILE_H

#include "tile.cuh"

/* HALF_STAGE in columns; rows are an odd number of 16-byte lines apart, so that 8 rows use different banks */
constexpr int HALF_STAGE = 64, HALF_PITCH = HALF_STAGE + 8, LINE_HALVES = LINE / 2;

template <bool BRAIN> struct halves { /* BRAIN: bfloat16 */
    static constexpr bool INTEGER = false, BLOCKS = false;
};

/* Rows of activations, zero past their end. */
struct half_rows {
    uint16_t *values; /* [n][n_stages][HALF_STAGE] */
    float *scales;    /* [n] by which to multiply */
    int32_t n_stages;
};
static inline half_rows half_rows_in(void *memory, int64_t n, int64_t cols) {
    half_rows r;
    r.n_stages = static_cast<int32_t>((cols + HALF_STAGE - 1) / HALF_STAGE);
    r.values = static_cast<uint16_t *>(memory);
    r.scales = reinterpret_cast<float *>(
        static_cast<char *>(memory) + whole_lines(static_cast<size_t>(n * r.n_stages * HALF_STAGE) * sizeof(uint16_t)));
    return r;
}
static inline size_t half_rows_bytes(int64_t n, int64_t cols) {
    return whole_lines(static_cast<size_t>(n * ((cols + HALF_STAGE - 1) / HALF_STAGE * HALF_STAGE)) *
                       sizeof(uint16_t)) +
           whole_lines(static_cast<size_t>(n) * sizeof(float));
}
/* r = x[n][cols] */
void round_halves(const launch &t, const half_rows &r, const float *x, int64_t n, int64_t cols, bool brain);

template <bool BRAIN, bool TENSOR, int WARPS_M, int WARPS_N, int MT, int NT, int RING>
struct tile<halves<BRAIN>, TENSOR, WARPS_M, WARPS_N, MT, NT, RING> {
    using places = tile_places<WARPS_M, WARPS_N, MT, NT>;
    using input = half_rows;
    static constexpr int ROWS = places::ROWS, TOKENS = places::TOKENS, THREADS = places::THREADS;
    static constexpr int BLOCKS = MT == 1 ? 4 : 2;
    struct sums {
        float sum[MT][NT][4];
    };
    struct scratch {
        alignas(LINE) uint16_t weights[RING][ROWS][HALF_PITCH];
        alignas(LINE) uint16_t x[RING][TOKENS][HALF_PITCH];
        bytes rows[ROWS];
        int32_t tokens[TOKENS];
    };

    template <class W, class X>
    __device__ static void run(sums &s, scratch *r, const half_rows &x, int cols, W row_of, X token_of) {
        for (int i = threadIdx.x; i < ROWS; i += THREADS) r->rows[i] = row_of(i);
        for (int i = threadIdx.x; i < TOKENS; i += THREADS) r->tokens[i] = token_of(i);
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int n = 0; n < NT; n++) DG_UNROLL
                for (int i = 0; i < 4; i++) s.sum[m][n][i] = 0.0f;
        block_sync();
        for (int i = 0; i < RING - 1; i++) {
            if (i < x.n_stages) fetch(r, x, i, cols);
            copy_async_commit();
        }
        for (int i = 0; i < x.n_stages; i++) {
            copy_async_wait<RING - 2>();
            block_sync();
            if (i + RING - 1 < x.n_stages) fetch(r, x, i + RING - 1, cols);
            copy_async_commit();
            multiply(s, r, i % RING);
        }
        copy_async_wait<0>();
        const int first = warp_id() % WARPS_N * (NT * 8) + 2 * (lane_id() % 4);
        DG_UNROLL for (int n = 0; n < NT; n++) DG_UNROLL
            for (int i = 0; i < 4; i++) DG_UNROLL
                for (int m = 0; m < MT; m++) s.sum[m][n][i] *= x.scales[r->tokens[first + 8 * n + i % 2]];
        block_sync();
    }

    __device__ static void fetch(scratch *r, const half_rows &x, int stage, int cols) {
        constexpr int LINES = HALF_STAGE / LINE_HALVES;
        const int at = stage % RING;
        DG_UNROLL for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
            const int row = i / LINES, c = i % LINES * LINE_HALVES, column = stage * HALF_STAGE + c;
            copy_async<LINE>(&r->weights[at][row][c], r->rows[row] + 2 * static_cast<int64_t>(column), column < cols);
        }
        DG_UNROLL for (int i = threadIdx.x; i < TOKENS * LINES; i += THREADS) {
            const int token = i / LINES, c = i % LINES * LINE_HALVES;
            copy_async<LINE>(&r->x[at][token][c],
                             x.values + (static_cast<int64_t>(r->tokens[token]) * x.n_stages + stage) * HALF_STAGE + c);
        }
    }

    __device__ static void multiply(sums &s, const scratch *r, int at) {
        if constexpr (TENSOR) {
            const int lane = lane_id(), row = warp_id() / WARPS_N * (MT * 16), first = warp_id() % WARPS_N * (NT * 8);
            DG_UNROLL for (int from = 0; from < HALF_STAGE; from += 32) {
                uint32_t a[MT][2][4];
                DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                    for (int k = 0; k < 2; k++)
                        load_matrices(a[m][k],
                                      &r->weights[at][row + 16 * m + lane % 16][from + 16 * k + lane / 16 * 8]);
                DG_UNROLL for (int n = 0; n < NT; n++) {
                    uint32_t both[4];
                    load_matrices(both, &r->x[at][first + 8 * n + lane % 8][from + lane / 8 * 8]);
                    DG_UNROLL for (int k = 0; k < 2; k++) {
                        const uint32_t b[2] = {both[2 * k], both[2 * k + 1]};
                        DG_UNROLL for (int m = 0; m < MT; m++) {
                            if constexpr (BRAIN) mma_bf16(s.sum[m][n], a[m][k], b);
                            else mma_f16(s.sum[m][n], a[m][k], b);
                        }
                    }
                }
            }
        }
    }

    template <class F> __device__ static void each(F f) { places::each(f); }
};

/* ---- Which formats have tiles ---- */

/* Calls f(codes_of_...()) or f(halves<...>()) for a weight that a tile multiplies on this device; false for the
 * others. */
template <class F> static inline bool for_tiles(const gpu *g, const tensor *w, F f) {
    if (for_codes(w->format->id, f)) return true;
    if (g->architecture < 80 || w->cols % LINE_HALVES) return false;
    if (w->format->id == DG_BF16) f(halves<true>());
    else if (w->format->id == DG_F16) f(halves<false>());
    else return false;
    return true;
}

/* Where x[n][cols] lies as the tiles of C take it, in memory of input_bytes(). */
template <class C> static inline quantized input_in(C, void *memory, int64_t n, int64_t cols) {
    return quantized_in(memory, n, cols);
}
template <bool BRAIN> static inline half_rows input_in(halves<BRAIN>, void *memory, int64_t n, int64_t cols) {
    return half_rows_in(memory, n, cols);
}

/* Rounds it. */
template <class C>
static inline auto round_input(const launch &t, C, void *memory, const float *x, int64_t n, int64_t cols) {
    const quantized r = quantized_in(memory, n, cols);
    quantize_rows(t, r, x, n, cols, C::INTEGER);
    return r;
}
template <bool BRAIN>
static inline half_rows round_input(const launch &t, halves<BRAIN>, void *memory, const float *x, int64_t n,
                                    int64_t cols) {
    const half_rows r = half_rows_in(memory, n, cols);
    round_halves(t, r, x, n, cols, BRAIN);
    return r;
}
static inline size_t input_bytes(int64_t n, int64_t cols) {
    const size_t a = quantized_bytes(n, cols), b = half_rows_bytes(n, cols);
    return a > b ? a : b;
}

#endif
