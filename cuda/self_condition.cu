/* Self-conditioning of a step, from what the head of the last one left: the rows of the likely ids times their shares.
 * Rows that cannot be told from few ids are computed over all of the vocabulary: on tensor cores, or in float32 where
 * computation is exact, on sm_75 and with a table that no tile decodes. head.cuh has the buffers. */
#include "head.cuh"
#include "naive.cuh"
#include "softmax_matmul.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;

/* ---- The length of a table's longest row ---- */

/* *longest: the squared length as the bits of a float, which order like integers. */
template <class F>
__global__ void __launch_bounds__(WARP)
    longest_kernel(int32_t *longest, const typename F::block *table, int64_t rows, int64_t cols) {
    const int64_t row_blocks = cols / F::VALUES;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        float square = 0.0f;
        for (int64_t b = threadIdx.x; b < row_blocks; b += WARP) {
            float values[F::VALUES];
            F::decode(table + row * row_blocks + b, values);
            for (int j = 0; j < F::VALUES; j++) square = fmaf(values[j], values[j], square);
        }
        square = warp_sum(square) * (1.0f + 1e-5f); /* more than its own rounding */
        int32_t bits;
        memcpy(&bits, &square, sizeof bits);
        if (threadIdx.x == 0) atomic_max(longest, bits);
    }
}

void find_longest(const launch &t, const tensor *table) {
    if (t.g->longest_of == table->placed || t.g->failure != cudaSuccess) return;
    gpu_check(t.g, cudaMemsetAsync(t.g->longest, 0, sizeof *t.g->longest, t.g->stream), t.op);
    for_format(table->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(longest_kernel<F>, dim3(static_cast<unsigned>(least(table->rows, 1024))), dim3(WARP), 0, t.g->longest,
                reinterpret_cast<const typename F::block *>(table->placed), table->rows, table->cols);
    });
    t.g->longest_of = table->placed;
}

/* ---- Softmax times the table, a stretch at a time ---- */

/* The state of a row so far: the peak, the sum of its shares in the unit of the sums, and by what the last stretch's
 * new peak shrinks what was before. */
struct row_state {
    float peak, total, shrink;
};

/* z = exp(z - peak) in place. count: NULL, or how many rows there are. cap 0: z is scaled already. longest: NULL, or
 * of the table: then shares are what softmax_matmul.cuh takes. */
__global__ void DG_HOT(THREADS) soften_kernel(row_state *states, float *z, int32_t width, const int32_t *count,
                                              bool first, float cap, const float *temperature, const float *longest) {
    DG_SHARED(float, scratch, WARPS);
    DG_SHARED(float, sums, WARPS);
    if (count && static_cast<int32_t>(blockIdx.x) >= *count) return;
    z += static_cast<int64_t>(blockIdx.x) * width;
    const row_state before = first ? row_state{-INFINITY, 0.0f, 0.0f} : states[blockIdx.x];
    float peak = before.peak;
    for (int32_t v = threadIdx.x; v < width; v += THREADS) {
        if (cap > 0.0f) z[v] = scaled(z[v], cap, *temperature);
        peak = z[v] > peak ? z[v] : peak;
    }
    peak = block_max<THREADS>(peak, scratch);
    float total = 0.0f;
    for (int32_t from = 0; from < width; from += THREADS) {
        const int32_t v = from + static_cast<int32_t>(threadIdx.x);
        /* which the peak may be as well */
        const float share = v < width && z[v] != -INFINITY ? expf(z[v] - peak) : 0.0f;
        if (longest) {
            const uint16_t rounded_share = half_from_float(share * SHARE_ONE);
            block_sync(); /* all that is written over was read */
            if (v < width + width % 2) reinterpret_cast<uint16_t *>(z)[v] = rounded_share;
            total += half_to_float(rounded_share);
        } else if (v < width) {
            z[v] = share;
            total += share;
        }
    }
    total = block_sum<THREADS>(total, sums);
    if (longest) total *= table_unit(*longest);
    const float shrink = before.peak == -INFINITY ? 0.0f : expf(before.peak - peak);
    if (threadIdx.x == 0) states[blockIdx.x] = row_state{peak, fmaf(before.total, shrink, total), shrink};
}

/* y[n][cols] = y * shrink + z[n][width] table: a block takes NAIVE rows and 256 columns. */
constexpr int SOFTMAX_THREADS = 128, SOFTMAX_COLUMNS = 256, SOFTMAX_PITCH = SOFTMAX_COLUMNS + 1;
template <class F>
__global__ void DG_HOT(SOFTMAX_THREADS)
    softmax_matmul_kernel(float *y, const row_state *states, const float *z, const typename F::block *table,
                          int32_t width, int64_t cols, int32_t n, const int32_t *count, bool first) {
    DG_SHARED(float, values, NAIVE *SOFTMAX_PITCH);
    DG_SHARED(float, shares, NAIVE *NAIVE);
    const int32_t first_row = static_cast<int32_t>(blockIdx.y) * NAIVE;
    if (count) n = *count;
    if (first_row >= n) return;
    const int64_t from = static_cast<int64_t>(blockIdx.x) * SOFTMAX_COLUMNS, row_blocks = cols / F::VALUES;
    const int columns = static_cast<int>(cols - from < SOFTMAX_COLUMNS ? cols - from : SOFTMAX_COLUMNS),
              per_row = columns / F::VALUES;
    float sum[NAIVE][2];
    for (int i = 0; i < NAIVE; i++)
        for (int c = 0; c < 2; c++) {
            const int column = static_cast<int>(threadIdx.x) + c * SOFTMAX_THREADS;
            const bool there = !first && first_row + i < n && column < columns;
            sum[i][c] = there ? y[(first_row + i) * cols + from + column] * states[first_row + i].shrink : 0.0f;
        }
    for (int32_t v = 0; v < width; v += NAIVE) {
        for (int i = threadIdx.x; i < NAIVE * per_row; i += SOFTMAX_THREADS) {
            const int r = i % NAIVE, b = i / NAIVE;
            if (v + r < width)
                F::decode(table + (v + r) * row_blocks + from / F::VALUES + b,
                          values + r * SOFTMAX_PITCH + b * F::VALUES);
        }
        for (int i = threadIdx.x; i < NAIVE * NAIVE; i += SOFTMAX_THREADS) {
            const int row = i / NAIVE, r = i % NAIVE;
            shares[i] =
                first_row + row < n && v + r < width ? z[static_cast<int64_t>(first_row + row) * width + v + r] : 0.0f;
        }
        block_sync();
        const int here = width - v < NAIVE ? width - v : NAIVE;
        for (int c = 0; c < 2; c++) {
            const int column = static_cast<int>(threadIdx.x) + c * SOFTMAX_THREADS;
            if (column < columns)
                for (int r = 0; r < here; r++)
                    for (int i = 0; i < NAIVE; i++)
                        sum[i][c] = fmaf(shares[i * NAIVE + r], values[r * SOFTMAX_PITCH + column], sum[i][c]);
        }
        block_sync();
    }
    for (int i = 0; i < NAIVE; i++)
        for (int c = 0; c < 2; c++) {
            const int column = static_cast<int>(threadIdx.x) + c * SOFTMAX_THREADS;
            if (first_row + i < n && column < columns) y[(first_row + i) * cols + from + column] = sum[i][c];
        }
}

/* The sums of softmax times the table. Tensor cores may have several, each of a part of every stretch's words: rows
 * and columns alone make too few blocks for a large device. */
constexpr int MOST_SPLITS = 6;
struct softmax_sums {
    float *first, *others; /* [n][cols]; [splits - 1][n][cols] */
    int32_t splits;
};

/* The same on tensor cores, with the shares that softmax_matmul.cuh takes; a block takes a tile, of one split. */
template <class W>
__global__ void DG_HOT(softmax_tile<W>::THREADS, 2)
    softmax_matmul_mma_kernel(softmax_sums y, const row_state *states, softmax_task task, const int32_t *count,
                              bool first, const float *longest) {
    if constexpr (runs_here(true)) {
        using T = softmax_tile<W>;
        DG_DYNAMIC_SHARED(typename T::scratch, scratch);
        const int split = static_cast<int>(blockIdx.z), stage = static_cast<int>(blockIdx.x),
                  steps = (task.width + T::WORDS - 1) / T::WORDS;
        float *const to = split ? y.others + static_cast<int64_t>(split - 1) * task.n * task.cols : y.first;
        const int32_t first_row = static_cast<int32_t>(blockIdx.y) * T::ROWS;
        if (count) task.n = *count;
        if (first_row >= task.n) return;
        typename T::sums sum;
        T::run(sum, scratch, task, first_row, stage, split * steps / y.splits, (split + 1) * steps / y.splits,
               table_unit(*longest));
        T::each(sum, [&](int i, int j, float here) {
            const int32_t row = first_row + i, column = stage * STAGE + j;
            if (row >= task.n || column >= task.cols) return;
            float *const at = to + static_cast<int64_t>(row) * task.cols + column;
            /* rounded, where tensor cores cut sums off: they begin anew */
            *at = first ? here : fmaf(*at, states[row].shrink, here);
        });
    }
}

/* y[rows[j] or j] = sums[j] / total * scale; y may be sums.first where rows is NULL. */
__global__ void finish_kernel(float *y, softmax_sums sums, const row_state *states, const int32_t *rows,
                              const int32_t *count, int32_t n, int64_t cols, float scale) {
    if (count && static_cast<int32_t>(blockIdx.x) >= *count) return;
    const int64_t row = rows ? rows[blockIdx.x] : static_cast<int64_t>(blockIdx.x);
    const float factor = scale / states[blockIdx.x].total;
    for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
        float sum = sums.first[blockIdx.x * cols + j];
        for (int split = 1; split < sums.splits; split++)
            sum += sums.others[((split - 1) * static_cast<int64_t>(n) + blockIdx.x) * cols + j];
        y[row * cols + j] = sum * factor;
    }
}

/* Takes one stretch of the table, whose logits are z[n][view->rows], into the sums. */
static void softmax_matmul(const launch &t, const softmax_sums &sums, row_state *states, float *z, const tensor *view,
                           int64_t n, const int32_t *count, bool first, float cap, const float *temperature) {
    const int32_t width = static_cast<int32_t>(view->rows);
    const row_state *const after = states;
    const float *const longest = reinterpret_cast<const float *>(t.g->longest);
    const auto soften = [&](const float *unit) {
        t.start(soften_kernel, dim3(rows_of(n)), dim3(THREADS), 0, states, z, width, count, first, cap, temperature,
                unit);
    };
    if (for_words(t.g, view, [&](auto words) {
            using T = softmax_tile<decltype(words)>;
            const softmax_task task = {
                reinterpret_cast<const uint16_t *>(z), static_cast<bytes>(view->placed), view->row_bytes, width,
                static_cast<int32_t>(view->cols),      static_cast<int32_t>(n)};
            soften(longest);
            t.start(softmax_matmul_mma_kernel<decltype(words)>,
                    dim3(blocks_for(view->cols, STAGE), blocks_for(n, T::ROWS), static_cast<unsigned>(sums.splits)),
                    dim3(T::THREADS), sizeof(typename T::scratch), sums, after, task, count, first, longest);
        }))
        return;
    soften(nullptr);
    for_format(view->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(softmax_matmul_kernel<F>, dim3(blocks_for(view->cols, SOFTMAX_COLUMNS), blocks_for(n, NAIVE)),
                dim3(SOFTMAX_THREADS), 0, sums.first, after, static_cast<const float *>(z),
                reinterpret_cast<const typename F::block *>(view->placed), width, view->cols, static_cast<int32_t>(n),
                count, first);
    });
}

void cuda_self_condition_dense(const ops *o, float *y, const float *z, const tensor *table, int64_t n, float scale,
                               float *work) {
    const launch t(o, "self_condition_dense");
    row_state *const states = reinterpret_cast<row_state *>(work + n * least(SELF_COND_STRETCH, table->rows));
    const softmax_sums sums = {y, nullptr, 1};
    find_longest(t, table);
    for (int64_t first = 0; first < table->rows; first += SELF_COND_STRETCH) {
        const tensor view = stretch_of(table, first);
        const size_t row = static_cast<size_t>(view.rows) * sizeof(float);
        if (t.g->failure == cudaSuccess)
            gpu_check(t.g,
                      cudaMemcpy2DAsync(work, row, z + first, static_cast<size_t>(table->rows) * sizeof(float), row,
                                        static_cast<size_t>(n), cudaMemcpyHostToDevice, t.g->stream),
                      t.op);
        softmax_matmul(t, sums, states, work, &view, n, nullptr, first == 0, 0.0f, nullptr);
    }
    t.start(finish_kernel, dim3(rows_of(n)), dim3(THREADS), 0, y, sums, static_cast<const row_state *>(states), nullptr,
            nullptr, static_cast<int32_t>(n), table->cols, scale);
}

/* ---- Self-conditioning from few ids ---- */

/* y[row] = the likely ids' rows times their shares; dense[row]: what was left out may matter by more than that part
 * of its length, or tolerance is negative. */
template <class F>
__global__ void DG_HOT(SOFTMAX_THREADS)
    sparse_kernel(float *y, int32_t *dense, self_cond s, const typename F::block *table, int64_t cols, float scale,
                  const float *longest, float tolerance) {
    constexpr int AT_ONCE = 8;
    DG_SHARED(float, values, AT_ONCE *SOFTMAX_PITCH);
    DG_SHARED(double, squares, SOFTMAX_THREADS / WARP);
    const int64_t i = blockIdx.x, row_blocks = cols / F::VALUES;
    const bool pinned = s.pinned && s.pinned[i]; /* such a row is its given id, or nothing */
    const int32_t count = pinned ? (s.given ? 1 : 0) : s.counts[i];
    const int32_t *const ids = pinned ? s.given + i : s.ids + i * SELF_COND_IDS;
    double square = 0.0;
    for (int64_t from = 0; from < cols; from += SOFTMAX_COLUMNS) {
        const int columns = static_cast<int>(cols - from < SOFTMAX_COLUMNS ? cols - from : SOFTMAX_COLUMNS),
                  per_row = columns / F::VALUES;
        float sum[2] = {0.0f, 0.0f};
        for (int32_t j = 0; j < count; j += AT_ONCE) {
            for (int k = threadIdx.x; k < AT_ONCE * per_row; k += SOFTMAX_THREADS) {
                const int r = k % AT_ONCE, b = k / AT_ONCE;
                if (j + r < count)
                    F::decode(table + ids[j + r] * row_blocks + from / F::VALUES + b,
                              values + r * SOFTMAX_PITCH + b * F::VALUES);
            }
            block_sync();
            for (int r = 0; r < AT_ONCE && j + r < count; r++) {
                const float share = (pinned ? 1.0f : s.shares[i * SELF_COND_IDS + j + r]) * scale;
                for (int c = 0; c < 2; c++) {
                    const int column = static_cast<int>(threadIdx.x) + c * SOFTMAX_THREADS;
                    if (column < columns) sum[c] = fmaf(share, values[r * SOFTMAX_PITCH + column], sum[c]);
                }
            }
            block_sync();
        }
        for (int c = 0; c < 2; c++) {
            const int column = static_cast<int>(threadIdx.x) + c * SOFTMAX_THREADS;
            if (column >= columns) continue;
            y[i * cols + from + column] = sum[c];
            square += static_cast<double>(sum[c]) * static_cast<double>(sum[c]);
        }
    }
    square = block_sum<SOFTMAX_THREADS>(square, squares);
    if (threadIdx.x == 0) {
        const double missed = s.dropped[i] * sqrt(static_cast<double>(*longest)) * static_cast<double>(scale);
        dense[i] = !pinned && (tolerance < 0.0f || missed > static_cast<double>(tolerance) * sqrt(square));
    }
}

/* rows[*count] = the dense ones in rising order. */
__global__ void __launch_bounds__(WARP) list_kernel(int32_t *rows, int32_t *count, const int32_t *dense, int32_t n) {
    int32_t before = 0;
    for (int32_t from = 0; from < n; from += WARP) {
        const int32_t i = from + lane_id();
        const uint32_t those = lanes_where(i < n && dense[i < n ? i : 0]);
        if (those >> lane_id() & 1u) rows[before + count_bits(those & ((1u << lane_id()) - 1u))] = i;
        before += count_bits(those);
    }
    if (lane_id() == 0) *count = before;
}

__global__ void gather_kernel(float *to, const float *x, const int32_t *rows, const int32_t *count, int64_t cols) {
    if (static_cast<int32_t>(blockIdx.x) >= *count) return;
    for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) to[blockIdx.x * cols + j] = x[rows[blockIdx.x] * cols + j];
}

void cuda_self_condition(const ops *o, float *y, const self_cond *s, const tensor *table, int64_t n, float scale,
                         void *work, float *) {
    const launch t(o, "self_condition");
    const size_t ints = whole_lines(static_cast<size_t>(n) * sizeof(int32_t)),
                 floats = whole_lines(static_cast<size_t>(n * table->cols) * sizeof(float));
    char *at = static_cast<char *>(work);
    auto *const dense = reinterpret_cast<int32_t *>(at), *const rows = reinterpret_cast<int32_t *>(at + ints),
                *const count = reinterpret_cast<int32_t *>(at + 2 * ints);
    auto *const states = reinterpret_cast<row_state *>(at + 2 * ints + 256);
    at += 2 * ints + 256 + whole_lines(static_cast<size_t>(n) * sizeof(row_state));
    auto *const x = reinterpret_cast<float *>(at), *const sums = reinterpret_cast<float *>(at + floats);
    void *const products = at + 2 * floats;
    /* As many splits as the lists, which nothing reads any more, have room for. */
    const int64_t spare = (table->rows + SELF_COND_GROUP - 1) / SELF_COND_GROUP *
                          static_cast<int64_t>(sizeof(self_cond_list)) /
                          (table->cols * static_cast<int64_t>(sizeof(float)));
    const int64_t others = for_words(t.g, table, [](auto) {}) ? least(spare, MOST_SPLITS - 1) : 0;
    const softmax_sums all = {sums, reinterpret_cast<float *>(s->lists), static_cast<int32_t>(1 + others)};
    for_format(table->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(sparse_kernel<F>, dim3(rows_of(n)), dim3(SOFTMAX_THREADS), 0, y, dense, *s,
                reinterpret_cast<const typename F::block *>(table->placed), table->cols, scale,
                reinterpret_cast<const float *>(t.g->longest), t.g->exact ? -1.0f : o->tolerance);
    });
    t.start(list_kernel, dim3(1), dim3(WARP), 0, rows, count, static_cast<const int32_t *>(dense),
            static_cast<int32_t>(n));
    t.start(gather_kernel, dim3(rows_of(n)), dim3(THREADS), 0, x, static_cast<const float *>(s->x),
            static_cast<const int32_t *>(rows), static_cast<const int32_t *>(count), table->cols);
    for (int64_t first = 0; first < table->rows; first += SELF_COND_STRETCH) { /* nothing where no row is dense */
        const tensor view = stretch_of(table, first);
        matmul_counted(t, s->z, x, &view, n, count, products);
        softmax_matmul(t, all, states, s->z, &view, n, count, first == 0, s->cap, s->temperature);
    }
    t.start(finish_kernel, dim3(rows_of(n)), dim3(THREADS), 0, y, all, static_cast<const row_state *>(states),
            static_cast<const int32_t *>(rows), static_cast<const int32_t *>(count), static_cast<int32_t>(n),
            table->cols, scale);
}
