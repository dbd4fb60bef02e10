/* See naive.cuh. */
#include "naive.cuh"

template <class F>
__global__ void __launch_bounds__(NAIVE_THREADS)
    naive_matmul_kernel(float *y, const float *x, const typename F::block *w, int64_t n, int64_t rows, int64_t cols,
                        const int32_t *count) {
    DG_SHARED(float, room_w, NAIVE *NAIVE_PITCH);
    DG_SHARED(float, room_x, NAIVE *NAIVE_PITCH);
    if (count) n = *count;
    if (static_cast<int64_t>(blockIdx.y) * NAIVE >= n) return;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * NAIVE,
                  first = static_cast<int64_t>(blockIdx.y) * NAIVE;
    float sum[2] = {0.0f, 0.0f};
    naive_tile<F>(
        sum, w + first_row * (cols / F::VALUES), cols, rows - first_row,
        [&](int i) { return first + i < n ? x + (first + i) * cols : nullptr; }, room_w, room_x);
    const int64_t row = first_row + threadIdx.x % NAIVE;
    for (int i = 0; i < 2; i++) {
        const int64_t token = first + threadIdx.x / NAIVE + i * NAIVE / 2;
        if (row < rows && token < n) y[token * rows + row] = sum[i];
    }
}

/* Float32 weights, the router's: each of SPLITS warps sums its share of the columns, a lane 4 rows by 2 tokens, and
 * the parts add up in their order. */
constexpr int SPLITS = 8;
__global__ void DG_HOT(SPLITS *WARP)
    float_matmul_kernel(float *y, const float *x, const float *w, int64_t n, int64_t rows, int64_t cols) {
    DG_SHARED(float, parts, SPLITS * NAIVE * NAIVE);
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * NAIVE,
                  first = static_cast<int64_t>(blockIdx.y) * NAIVE, quads = cols / 4;
    const int row = lane_id() / 8 * 4, token = lane_id() % 8 * 2;
    const float4 *from_w[4], *from_x[2];
    DG_UNROLL for (int i = 0; i < 4; i++)
        from_w[i] =
            reinterpret_cast<const float4 *>(w + (first_row + row + i < rows ? first_row + row + i : rows - 1) * cols);
    DG_UNROLL for (int j = 0; j < 2; j++)
        from_x[j] = reinterpret_cast<const float4 *>(x + (first + token + j < n ? first + token + j : n - 1) * cols);
    float sum[4][2] = {};
    for (int64_t q = warp_id() * quads / SPLITS; q < (warp_id() + 1) * quads / SPLITS; q++) {
        const float4 b[2] = {from_x[0][q], from_x[1][q]};
        DG_UNROLL for (int i = 0; i < 4; i++) {
            const float4 a = from_w[i][q];
            DG_UNROLL for (int j = 0; j < 2; j++)
                sum[i][j] = fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, sum[i][j]))));
        }
    }
    DG_UNROLL for (int i = 0; i < 4; i++) DG_UNROLL
        for (int j = 0; j < 2; j++) parts[(warp_id() * NAIVE + token + j) * NAIVE + row + i] = sum[i][j];
    block_sync();
    static_assert(SPLITS * WARP == NAIVE * NAIVE, "a thread per result");
    const int64_t at_row = first_row + threadIdx.x % NAIVE, at = first + threadIdx.x / NAIVE;
    float total = 0.0f;
    for (int p = 0; p < SPLITS; p++) total += parts[p * NAIVE * NAIVE + static_cast<int>(threadIdx.x)];
    if (at_row < rows && at < n) y[at * rows + at_row] = total;
}

void split_matmul(const launch &t, float *y, const float *x, const tensor *w, int64_t n) {
    if (w->format->id == DG_F32 && w->cols % 4 == 0)
        t.start(float_matmul_kernel, dim3(blocks_for(w->rows, NAIVE), blocks_for(n, NAIVE)), dim3(SPLITS * WARP), 0, y,
                x, reinterpret_cast<const float *>(w->placed), n, w->rows, w->cols);
    else naive_matmul(t, y, x, w, n, nullptr);
}

void naive_matmul(const launch &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *count) {
    for_format(w->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(naive_matmul_kernel<F>, dim3(blocks_for(w->rows, NAIVE), blocks_for(n, NAIVE)), dim3(NAIVE_THREADS), 0,
                y, x, reinterpret_cast<const typename F::block *>(w->placed), n, w->rows, w->cols, count);
    });
}

template <class F>
__global__ void __launch_bounds__(NAIVE_THREADS)
    naive_gathered_kernel(float *z, const float *x, const typename F::block *table, const int32_t *chunks, int64_t rows,
                          int64_t cols) {
    DG_SHARED(float, room_w, NAIVE *NAIVE_PITCH);
    DG_SHARED(float, room_x, NAIVE *NAIVE_PITCH);
    const int64_t first_row = static_cast<int64_t>(chunks[blockIdx.y]) * SELF_COND_CHUNK + blockIdx.x * NAIVE;
    float sum[2] = {0.0f, 0.0f};
    if (first_row >= rows) return;
    naive_tile<F>(
        sum, table + first_row * (cols / F::VALUES), cols, rows - first_row,
        [&](int i) { return i == 0 ? x + blockIdx.y * cols : nullptr; }, room_w, room_x);
    if (threadIdx.x < NAIVE && first_row + threadIdx.x < rows)
        z[static_cast<int64_t>(blockIdx.y) * SELF_COND_CHUNK + blockIdx.x * NAIVE + threadIdx.x] = sum[0];
}

void naive_gathered(const launch &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n) {
    for_format(table->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(naive_gathered_kernel<F>, dim3(SELF_COND_CHUNK / NAIVE, static_cast<unsigned>(n)), dim3(NAIVE_THREADS),
                0, z, x, reinterpret_cast<const typename F::block *>(table->placed), chunks, table->rows, table->cols);
    });
}

/* ---- Experts ---- */

constexpr int ORDER_THREADS = 256, LEAST_HEIGHT = 16;

/* One block: a thread per expert counts its pairs and, when all know where theirs begin, writes them in order. */
__global__ void __launch_bounds__(ORDER_THREADS)
    order_kernel(expert_order o, const int32_t *experts, int32_t n_pairs, int32_t n_expert, int32_t height) {
    DG_DYNAMIC_SHARED(int32_t, first); /* [2 * n_expert]: pairs, then tiles, before each expert's */
    int32_t *const first_tile = first + n_expert;
    for (int32_t e = threadIdx.x; e < n_expert; e += ORDER_THREADS) {
        int32_t count = 0;
        for (int32_t p = 0; p < n_pairs; p++) count += experts[p] == e;
        first[e] = count;
    }
    block_sync();
    if (threadIdx.x == 0) {
        int32_t pairs = 0, tiles = 0;
        for (int32_t e = 0; e < n_expert; e++) {
            const int32_t count = first[e];
            first[e] = pairs;
            first_tile[e] = tiles;
            o.start[e] = pairs;
            pairs += count;
            tiles += (count + height - 1) / height;
        }
        o.start[n_expert] = pairs;
        for (; tiles < o.most_tiles; tiles++) o.tiles[tiles] = make_int2(-1, 0);
    }
    block_sync();
    for (int32_t e = threadIdx.x; e < n_expert; e += ORDER_THREADS) {
        int32_t at = first[e];
        for (int32_t p = 0; p < n_pairs; p++)
            if (experts[p] == e) o.pairs[at++] = p;
        for (int32_t from = first[e], tile = first_tile[e]; from < at; from += height)
            o.tiles[tile++] = make_int2(e, from);
    }
}

static size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }
static int32_t most_tiles(int64_t n_pairs, int64_t n_expert, int32_t height) {
    return static_cast<int32_t>(n_pairs / height + (n_expert < n_pairs ? n_expert : n_pairs));
}

size_t expert_order_bytes(int64_t n_pairs, int64_t n_expert) {
    return padded(static_cast<size_t>(n_expert + 1) * sizeof(int32_t)) +
           padded(static_cast<size_t>(n_pairs) * sizeof(int32_t)) +
           padded(static_cast<size_t>(most_tiles(n_pairs, n_expert, LEAST_HEIGHT)) * sizeof(int2));
}

expert_order order_experts(const launch &t, void *memory, const int32_t *experts, int64_t n_pairs, int64_t n_expert,
                           int32_t height) {
    expert_order o;
    char *at = static_cast<char *>(memory);
    o.start = reinterpret_cast<int32_t *>(at), at += padded(static_cast<size_t>(n_expert + 1) * sizeof(int32_t));
    o.pairs = reinterpret_cast<int32_t *>(at), at += padded(static_cast<size_t>(n_pairs) * sizeof(int32_t));
    o.tiles = reinterpret_cast<int2 *>(at);
    o.most_tiles = most_tiles(n_pairs, n_expert, height);
    t.start(order_kernel, dim3(1), dim3(ORDER_THREADS), static_cast<size_t>(2 * n_expert) * sizeof(int32_t), o, experts,
            static_cast<int32_t>(n_pairs), static_cast<int32_t>(n_expert), height);
    return o;
}

__global__ void combine_kernel(float *y, const float *out, const int32_t *experts, const float *weights, int64_t k,
                               int64_t d, portion here, bool more) {
    const int64_t i = blockIdx.x;
    for (int64_t j = threadIdx.x; j < d; j += blockDim.x) {
        float sum = more ? y[i * d + j] : 0.0f;
        for (int64_t s = 0; s < k; s++)
            if (here.has(experts[i * k + s])) sum = fmaf(weights[i * k + s], out[(i * k + s) * d + j], sum);
        y[i * d + j] = sum;
    }
}

void combine_experts(const launch &t, float *y, const float *out, const int32_t *experts, const float *weights,
                     int64_t n, int64_t k, int64_t d, portion here, bool more) {
    t.start(combine_kernel, dim3(static_cast<unsigned>(n)), dim3(256), 0, y, out, experts, weights, k, d, here, more);
}

/* hidden[place in pairs][d_expert] = gelu(gate x) * up x, or, without an up, out[pair][rows] = down hidden. */
template <class F, bool DOWN>
__global__ void __launch_bounds__(NAIVE_THREADS)
    naive_experts_kernel(float *y, const float *x, expert_matrix w, expert_matrix up, int64_t rows, int64_t cols,
                         expert_order o, int32_t k, portion some) {
    DG_SHARED(float, room_w, NAIVE *NAIVE_PITCH);
    DG_SHARED(float, room_x, NAIVE *NAIVE_PITCH);
    const int2 tile = o.tiles[blockIdx.y];
    if (!some.has(tile.x)) return;
    const int32_t end = o.start[tile.x + 1];
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * NAIVE, row = first_row + threadIdx.x % NAIVE;
    const int64_t at = first_row * (cols / F::VALUES);
    const auto blocks_of = [&](const expert_matrix &m) {
        return reinterpret_cast<const typename F::block *>(m.of(tile.x)) + at;
    };
    const auto x_of = [&](int i) -> const float * {
        const int32_t place = tile.y + i;
        if (place >= end) return nullptr;
        return x + (DOWN ? place : o.pairs[place] / k) * cols;
    };
    float sum[2] = {0.0f, 0.0f}, other[2] = {0.0f, 0.0f};
    naive_tile<F>(sum, blocks_of(w), cols, rows - first_row, x_of, room_w, room_x);
    if (!DOWN) naive_tile<F>(other, blocks_of(up), cols, rows - first_row, x_of, room_w, room_x);
    for (int i = 0; i < 2; i++) {
        const int32_t place = tile.y + static_cast<int32_t>(threadIdx.x / NAIVE) + i * NAIVE / 2;
        if (row >= rows || place >= end) continue;
        if (DOWN) y[o.pairs[place] * rows + row] = sum[i];
        else y[place * rows + row] = gelu_tanh(sum[i]) * other[i];
    }
}

void naive_experts(const launch &t, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down,
                   const int32_t *experts, const float *weights, int64_t n, int64_t k, void *work) {
    const expert_order order = order_experts(t, work, experts, n * k, gate->experts, NAIVE);
    float *const hidden =
        reinterpret_cast<float *>(static_cast<char *>(work) + expert_order_bytes(n * k, gate->experts));
    float *const out = hidden + n * k * gate->rows;
    const auto most = static_cast<unsigned>(order.most_tiles);
    const layer_offload *const placed = layer_offload_of(t.g, gate);
    const bool beside = begin_beside(t, placed, y, x, experts, weights, n, k);
    const expert_matrix none = {};
    for_portions(t, placed, static_cast<int32_t>(gate->experts), [&](portion some) {
        for_format(gate->format->id, [&](auto format) {
            t.start(naive_experts_kernel<decltype(format), false>, dim3(blocks_for(gate->rows, NAIVE), most),
                    dim3(NAIVE_THREADS), 0, hidden, x, expert_matrix_of(placed, gate, 0),
                    expert_matrix_of(placed, up, 1), gate->rows, gate->cols, order, static_cast<int32_t>(k), some);
        });
        for_format(down->format->id, [&](auto format) {
            t.start(naive_experts_kernel<decltype(format), true>, dim3(blocks_for(down->rows, NAIVE), most),
                    dim3(NAIVE_THREADS), 0, out, static_cast<const float *>(hidden), expert_matrix_of(placed, down, 2),
                    none, down->rows, down->cols, order, static_cast<int32_t>(k), some);
        });
    });
    if (beside) end_beside(t);
    combine_experts(t, y, out, experts, weights, n, k, down->rows,
                    portion_here(placed, static_cast<int32_t>(gate->experts)), beside);
}
