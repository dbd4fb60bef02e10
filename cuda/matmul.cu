/* The operation `matmul`: its kernels, and the choice of a kernel for each format. */
#include "matmul.cuh"
#include "naive.cuh"
#include "half_tile.cuh"

/* Tiles of 64 rows: for many tokens 64 of them, for few 16. */
template <class C, bool TENSOR> using wide_tile = tile<C, TENSOR, 2, 2, 2, 4, TENSOR ? 3 : 2>;
template <class C, bool TENSOR> using narrow_tile = tile<C, TENSOR, 4, 1, 1, 2, TENSOR ? 4 : 2>;
constexpr int64_t NARROW = 16;

/* y[n][rows]; or, with chunks, y[n][SELF_COND_CHUNK], of token i the rows of chunk chunks[i]. */
template <class T, bool TENSOR>
__global__ void DG_HOT(T::THREADS, T::BLOCKS)
    tile_matmul_kernel(float *y, typename T::input x, bytes w, int32_t n, int64_t rows, int64_t row_bytes, int32_t cols,
                       const int32_t *chunks, const int32_t *count) {
    if constexpr (runs_here(TENSOR)) {
        DG_DYNAMIC_SHARED(typename T::scratch, scratch);
        const int64_t first_row = static_cast<int64_t>(blockIdx.y) * T::ROWS +
                                  (chunks ? static_cast<int64_t>(chunks[blockIdx.x]) * SELF_COND_CHUNK : 0);
        const int32_t first = static_cast<int32_t>(blockIdx.x) * (chunks ? 1 : T::TOKENS), end = chunks  ? first + 1
                                                                                                 : count ? *count
                                                                                                         : n;
        if (first_row >= rows || first >= end) return;
        typename T::sums sums;
        T::run(
            sums, scratch, x, cols,
            [&](int i) { return w + (first_row + i < rows ? first_row + i : rows - 1) * row_bytes; },
            [&](int i) { return first + i < end ? first + i : end - 1; });
        const int64_t pitch = chunks ? static_cast<int64_t>(SELF_COND_CHUNK) : rows,
                      column = chunks ? static_cast<int64_t>(blockIdx.y) * T::ROWS : first_row;
        T::each([&](int row, int token, int m, int n8, int i) {
            if (first_row + row < rows && first + token < end)
                y[(first + token) * pitch + column + row] = sums.sum[m][n8][i];
        });
    }
}

template <class T, bool TENSOR>
static void start(const launch &t, float *y, const typename T::input &x, const tensor *w, int64_t n,
                  const int32_t *chunks, const int32_t *count) {
    const dim3 grid(chunks ? static_cast<unsigned>(n) : blocks_for(n, T::TOKENS),
                    blocks_for(chunks ? static_cast<int64_t>(SELF_COND_CHUNK) : w->rows, T::ROWS));
    t.start(tile_matmul_kernel<T, TENSOR>, grid, dim3(T::THREADS), sizeof(typename T::scratch), y, x,
            static_cast<bytes>(w->placed), static_cast<int32_t>(n), w->rows, w->row_bytes,
            static_cast<int32_t>(w->cols), chunks, count);
}

/* False where no tile multiplies the weight. */
static bool tiled_matmul(const launch &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *chunks,
                         const int32_t *count, void *work) {
    return for_tiles(t.g, w, [&](auto format) {
        using C = decltype(format);
        const bool narrow = chunks || n <= NARROW;
        const auto r = round_input(t, format, work, x, n, w->cols);
        if (t.g->architecture >= 80)
            narrow ? start<narrow_tile<C, true>, true>(t, y, r, w, n, chunks, count)
                   : start<wide_tile<C, true>, true>(t, y, r, w, n, chunks, count);
        else
            narrow ? start<narrow_tile<C, false>, false>(t, y, r, w, n, chunks, count)
                   : start<wide_tile<C, false>, false>(t, y, r, w, n, chunks, count);
    });
}

void cuda_matmul(const ops *o, float *y, const float *x, const tensor *w, int64_t n, void *work) {
    const launch t(o, "matmul");
    if (t.g->exact || !tiled_matmul(t, y, x, w, n, nullptr, nullptr, work)) split_matmul(t, y, x, w, n);
}

void matmul_counted(const launch &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *count,
                    void *work) {
    if (t.g->exact || !tiled_matmul(t, y, x, w, n, nullptr, count, work)) naive_matmul(t, y, x, w, n, count);
}

void matmul_gathered(const launch &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n,
                     void *work) {
    if (t.g->exact || !tiled_matmul(t, z, x, table, n, chunks, nullptr, work))
        naive_gathered(t, z, x, table, chunks, n);
}
