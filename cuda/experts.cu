/* The operation `experts`: its kernels, and the choice of a kernel for each format. */
#include "naive.cuh"
#include "half_tile.cuh"

/* A pair is a token and one of its experts. pair_tile computes 64 rows of gate and the same 64 rows of up for some
 * pairs of an expert, so that each warp has both values of a row. down_tile computes 64 rows of down. */
template <class C, bool TENSOR, int NT> using pair_tile = tile<C, TENSOR, 4, 1, 2, NT, TENSOR ? 3 : 2>;
template <class C, bool TENSOR, int NT> using down_tile = tile<C, TENSOR, 4, 1, 1, NT, TENSOR ? 4 : 2>;
/* Floats from one token to the next in shared memory: with this padding, threads that write together use different
 * banks. */
constexpr int PAIR_ROWS = 64, HIDDEN_PITCH = PAIR_ROWS + 4;

/* hidden[place][rows] = gelu(gate x) * up x for each pair, in the order of o.pairs. The result is written to `hidden`
 * as floats or, where that is NULL, to quantized_hidden, rounded to int8 with a scale for every 32 columns. */
template <class C, bool TENSOR, int NT>
__global__ void DG_HOT(128, pair_tile<C, TENSOR, NT>::BLOCKS)
    gate_up_kernel(float *hidden, quantized quantized_hidden, typename pair_tile<C, TENSOR, NT>::input x,
                   expert_matrix gate, expert_matrix up, expert_order o, portion some, int32_t k, int32_t rows,
                   int64_t row_bytes, int32_t cols) {
    if constexpr (runs_here(TENSOR)) {
        using T = pair_tile<C, TENSOR, NT>;
        static_assert(T::THREADS == 128 && T::ROWS == 2 * PAIR_ROWS &&
                          sizeof(typename T::scratch) >= T::TOKENS * HIDDEN_PITCH * sizeof(float),
                      "as launched");
        DG_DYNAMIC_SHARED(typename T::scratch, scratch);
        const int2 run = o.tiles[blockIdx.y];
        if (!some.has(run.x)) return;
        const int32_t first_row = static_cast<int32_t>(blockIdx.x) * PAIR_ROWS, expert_end = o.start[run.x + 1];
        const int32_t end = run.y + T::TOKENS < expert_end ? run.y + T::TOKENS : expert_end;
        const bytes gates = gate.of(run.x), ups = up.of(run.x);
        typename T::sums sums;
        T::run(
            sums, scratch, x, cols,
            [&](int i) { /* rows alternate: 16 rows of gate, the same 16 of up, the next 16 of gate */
                         const int32_t row = first_row + i / 32 * 16 + i % 16;
                         return (i / 16 % 2 ? ups : gates) + (row < rows ? row : rows - 1) * row_bytes;
            },
            [&](int i) { return o.pairs[run.y + i < end ? run.y + i : end - 1] / k; });
        float *const values = reinterpret_cast<float *>(scratch); /* [TOKENS][HIDDEN_PITCH] */
        T::each([&](int row, int token, int m, int n, int i) {
            if (m == 0)
                values[token * HIDDEN_PITCH + row / 32 * 16 + row % 16] =
                    gelu_tanh(sums.sum[0][n][i]) * sums.sum[1][n][i];
        });
        block_sync();
        /* Eight threads write a sub-block of 32 columns, four values each. */
        for (int item = threadIdx.x / 8; item < T::TOKENS * (PAIR_ROWS / SUB); item += T::THREADS / 8) {
            const int token = item / (PAIR_ROWS / SUB),
                      from = item % (PAIR_ROWS / SUB) * SUB + static_cast<int>(threadIdx.x % 8) * 4;
            const float *const at = values + token * HIDDEN_PITCH + from;
            const float v[4] = {at[0], at[1], at[2], at[3]};
            const int32_t place = run.y + token, column = first_row + from;
            if (hidden) {
                for (int i = 0; i < 4; i++)
                    if (place < end && column + i < rows)
                        hidden[static_cast<int64_t>(place) * rows + column + i] = v[i];
            } else {
                float scale;
                const uint32_t codes = round_sub(v, &scale);
                if (place < end && column < rows) {
                    quantized_stage *const to = quantized_hidden.stages +
                                                static_cast<int64_t>(place) * quantized_hidden.n_stages +
                                                column / STAGE;
                    reinterpret_cast<uint32_t *>(to->codes)[column % STAGE / 4] = codes;
                    if (threadIdx.x % 8 == 0) to->scales[column % STAGE / SUB] = scale;
                }
            }
        }
    }
}

/* out[pair][rows] = down hidden, for each pair. */
template <class C, bool TENSOR, int NT>
__global__ void DG_HOT(128, down_tile<C, TENSOR, NT>::BLOCKS)
    down_kernel(float *out, typename down_tile<C, TENSOR, NT>::input hidden, expert_matrix down, expert_order o,
                portion some, int32_t rows, int64_t row_bytes, int32_t cols) {
    if constexpr (runs_here(TENSOR)) {
        using T = down_tile<C, TENSOR, NT>;
        static_assert(T::THREADS == 128 && T::ROWS == PAIR_ROWS, "as launched");
        DG_DYNAMIC_SHARED(typename T::scratch, scratch);
        const int2 run = o.tiles[blockIdx.y];
        if (!some.has(run.x)) return;
        const int32_t first_row = static_cast<int32_t>(blockIdx.x) * T::ROWS, expert_end = o.start[run.x + 1];
        const int32_t end = run.y + T::TOKENS < expert_end ? run.y + T::TOKENS : expert_end;
        typename T::sums sums;
        T::run(
            sums, scratch, hidden, cols,
            [&](int i) { return down.of(run.x) + (first_row + i < rows ? first_row + i : rows - 1) * row_bytes; },
            [&](int i) { return run.y + i < end ? run.y + i : end - 1; });
        T::each([&](int row, int token, int m, int n, int i) {
            if (first_row + row < rows && run.y + token < end)
                out[static_cast<int64_t>(o.pairs[run.y + token]) * rows + first_row + row] = sums.sum[m][n][i];
        });
    }
}

/* The arguments of one call of the operation, and its parts of the work memory. */
struct mixture {
    const launch &t;
    const tensor *gate, *up, *down;
    const layer_offload *placed;
    int64_t n, k;
    expert_order order;
    float *out, *hidden;
    quantized quantized_hidden;
};

template <class C, bool TENSOR, int NT>
static void start_gate_up(const mixture &m, portion some, const typename pair_tile<C, TENSOR, NT>::input &x,
                          float *hidden) {
    using T = pair_tile<C, TENSOR, NT>;
    m.t.start(gate_up_kernel<C, TENSOR, NT>,
              dim3(blocks_for(m.gate->rows, PAIR_ROWS), static_cast<unsigned>(m.order.most_tiles)), dim3(T::THREADS),
              sizeof(typename T::scratch), hidden, m.quantized_hidden, x, expert_matrix_of(m.placed, m.gate, 0),
              expert_matrix_of(m.placed, m.up, 1), m.order, some, static_cast<int32_t>(m.k),
              static_cast<int32_t>(m.gate->rows), m.gate->row_bytes, static_cast<int32_t>(m.gate->cols));
}

template <class C, bool TENSOR, int NT>
static void start_down(const mixture &m, portion some, const typename down_tile<C, TENSOR, NT>::input &hidden) {
    using T = down_tile<C, TENSOR, NT>;
    m.t.start(down_kernel<C, TENSOR, NT>,
              dim3(blocks_for(m.down->rows, T::ROWS), static_cast<unsigned>(m.order.most_tiles)), dim3(T::THREADS),
              sizeof(typename T::scratch), m.out, hidden, expert_matrix_of(m.placed, m.down, 2), m.order, some,
              static_cast<int32_t>(m.down->rows), m.down->row_bytes, static_cast<int32_t>(m.down->cols));
}

/* Returns the hidden values as the input of down: they were rounded by gate_up_kernel (in_place), or are rounded now.
 */
template <class C> static auto input_of_down(const launch &t, const mixture &m, C format, bool in_place, void *memory) {
    if constexpr (C::BLOCKS)
        if (in_place) return m.quantized_hidden;
    return round_input(t, format, memory, m.hidden, m.n * m.k, m.down->cols);
}

/* The number of pairs in a tile. Large tiles read the weights less often, but are mostly empty where experts have few
 * pairs. */
constexpr int32_t SMALL_TILE = 16, LARGE_TILE = 32;
static int32_t tile_pairs(int64_t pairs, int64_t n_expert) {
    return 4 * pairs >= 3 * SMALL_TILE * n_expert ? LARGE_TILE : SMALL_TILE;
}

static bool tiled_experts(const launch &t, float *y, const float *x, const tensor *gate, const tensor *up,
                          const tensor *down, const int32_t *experts, const float *weights, int64_t n, int64_t k,
                          void *work) {
    bool in_place = false; /* whether gate_up_kernel rounds the hidden values */
    if (gate->format != up->format || !for_tiles(t.g, gate, [](auto) {}) ||
        !for_tiles(t.g, down, [&](auto format) { in_place = decltype(format)::BLOCKS && !decltype(format)::INTEGER; }))
        return false;
    const int32_t pairs_per_tile = tile_pairs(n * k, gate->experts);
    const bool tensor_cores = t.g->architecture >= 80;
    mixture m = {t,
                 gate,
                 up,
                 down,
                 layer_offload_of(t.g, gate),
                 n,
                 k,
                 order_experts(t, work, experts, n * k, gate->experts, pairs_per_tile),
                 nullptr,
                 nullptr,
                 {}};
    char *at = static_cast<char *>(work) + expert_order_bytes(n * k, gate->experts);
    m.out = reinterpret_cast<float *>(at), at += whole_lines(static_cast<size_t>(n * k * down->rows) * sizeof(float));
    m.hidden = reinterpret_cast<float *>(at),
    at += in_place ? 0 : whole_lines(static_cast<size_t>(n * k * down->cols) * sizeof(float));
    void *const room_x = at, *const room_hidden = at + input_bytes(n, gate->cols);
    m.quantized_hidden = quantized_in(room_hidden, n * k, down->cols);
    const bool beside = begin_beside(t, m.placed, y, x, experts, weights, n, k);
    for_tiles(t.g, gate, [&](auto format) { round_input(t, format, room_x, x, n, gate->cols); });
    for_portions(t, m.placed, static_cast<int32_t>(gate->experts), [&](portion some) {
        for_tiles(t.g, gate, [&](auto format) {
            using C = decltype(format);
            float *const hidden = in_place ? nullptr : m.hidden;
            const auto r = input_in(format, room_x, n, gate->cols);
            if (tensor_cores)
                pairs_per_tile == SMALL_TILE ? start_gate_up<C, true, SMALL_TILE / 8>(m, some, r, hidden)
                                             : start_gate_up<C, true, LARGE_TILE / 8>(m, some, r, hidden);
            else
                pairs_per_tile == SMALL_TILE ? start_gate_up<C, false, SMALL_TILE / 8>(m, some, r, hidden)
                                             : start_gate_up<C, false, LARGE_TILE / 8>(m, some, r, hidden);
        });
        for_tiles(t.g, down, [&](auto format) {
            using C = decltype(format);
            const auto r = input_of_down(t, m, format, in_place, room_hidden);
            if (tensor_cores)
                pairs_per_tile == SMALL_TILE ? start_down<C, true, SMALL_TILE / 8>(m, some, r)
                                             : start_down<C, true, LARGE_TILE / 8>(m, some, r);
            else
                pairs_per_tile == SMALL_TILE ? start_down<C, false, SMALL_TILE / 8>(m, some, r)
                                             : start_down<C, false, LARGE_TILE / 8>(m, some, r);
        });
    });
    if (beside) end_beside(t);
    combine_experts(t, y, m.out, experts, weights, n, k, down->rows,
                    portion_here(m.placed, static_cast<int32_t>(gate->experts)), beside);
    return true;
}

void cuda_experts(const ops *o, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                  const int32_t *experts, const float *weights, int64_t n, int64_t k, const expert_feed *, void *work) {
    const launch t(o, "experts");
    if (t.g->exact || !tiled_experts(t, y, x, gate, up, down, experts, weights, n, k, work))
        naive_experts(t, y, x, gate, up, down, experts, weights, n, k, work);
}
