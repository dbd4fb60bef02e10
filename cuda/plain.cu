/* See plain.cuh. */
#include "plain.cuh"

template <class F>
__global__ void __launch_bounds__(PLAIN_THREADS) plain_matmul_kernel(float *y, const float *x, const typename F::block *w, int64_t n, int64_t rows, int64_t cols,
                                                                     const int32_t *count) {
    DG_SHARED(float, room_w, PLAIN * PLAIN_PITCH);
    DG_SHARED(float, room_x, PLAIN * PLAIN_PITCH);
    if (count) n = *count;
    if (static_cast<int64_t>(blockIdx.y) * PLAIN >= n) return;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * PLAIN, first = static_cast<int64_t>(blockIdx.y) * PLAIN;
    float sum[2] = {0.0f, 0.0f};
    plain_tile<F>(sum, w + first_row * (cols / F::VALUES), cols, rows - first_row, [&](int i) { return first + i < n ? x + (first + i) * cols : nullptr; }, room_w, room_x);
    const int64_t row = first_row + threadIdx.x % PLAIN;
    for (int i = 0; i < 2; i++) {
        const int64_t token = first + threadIdx.x / PLAIN + i * PLAIN / 2;
        if (row < rows && token < n) y[token * rows + row] = sum[i];
    }
}

void plain_matmul(const turn &t, float *y, const float *x, const tensor *w, int64_t n, const int32_t *count) {
    for_format(w->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(plain_matmul_kernel<F>, dim3(blocks_for(w->rows, PLAIN), blocks_for(n, PLAIN)), dim3(PLAIN_THREADS), 0, y, x,
                reinterpret_cast<const typename F::block *>(w->placed), n, w->rows, w->cols, count);
    });
}

template <class F>
__global__ void __launch_bounds__(PLAIN_THREADS) plain_gathered_kernel(float *z, const float *x, const typename F::block *table, const int32_t *chunks, int64_t rows, int64_t cols) {
    DG_SHARED(float, room_w, PLAIN * PLAIN_PITCH);
    DG_SHARED(float, room_x, PLAIN * PLAIN_PITCH);
    const int64_t first_row = static_cast<int64_t>(chunks[blockIdx.y]) * SOFT_CHUNK + blockIdx.x * PLAIN;
    float sum[2] = {0.0f, 0.0f};
    if (first_row >= rows) return;
    plain_tile<F>(sum, table + first_row * (cols / F::VALUES), cols, rows - first_row, [&](int i) { return i == 0 ? x + blockIdx.y * cols : nullptr; }, room_w, room_x);
    if (threadIdx.x < PLAIN && first_row + threadIdx.x < rows) z[static_cast<int64_t>(blockIdx.y) * SOFT_CHUNK + blockIdx.x * PLAIN + threadIdx.x] = sum[0];
}

void plain_gathered(const turn &t, float *z, const float *x, const tensor *table, const int32_t *chunks, int64_t n) {
    for_format(table->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(plain_gathered_kernel<F>, dim3(SOFT_CHUNK / PLAIN, static_cast<unsigned>(n)), dim3(PLAIN_THREADS), 0, z, x,
                reinterpret_cast<const typename F::block *>(table->placed), chunks, table->rows, table->cols);
    });
}

/* ---- Experts ---- */

constexpr int ORDER_THREADS = 256, LEAST_HEIGHT = 16;

/* One block: a thread per expert counts its pairs and, when all know where theirs begin, writes them in order. */
__global__ void __launch_bounds__(ORDER_THREADS) order_kernel(expert_order o, const int32_t *experts, int32_t n_pairs, int32_t n_expert, int32_t height) {
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
        for (int32_t from = first[e], tile = first_tile[e]; from < at; from += height) o.tiles[tile++] = make_int2(e, from);
    }
}

static size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }
static int32_t most_tiles(int64_t n_pairs, int64_t n_expert, int32_t height) {
    return static_cast<int32_t>(n_pairs / height + (n_expert < n_pairs ? n_expert : n_pairs));
}

size_t expert_order_bytes(int64_t n_pairs, int64_t n_expert) {
    return rounded(static_cast<size_t>(n_expert + 1) * sizeof(int32_t)) + rounded(static_cast<size_t>(n_pairs) * sizeof(int32_t)) +
           rounded(static_cast<size_t>(most_tiles(n_pairs, n_expert, LEAST_HEIGHT)) * sizeof(int2));
}

expert_order order_experts(const turn &t, void *memory, const int32_t *experts, int64_t n_pairs, int64_t n_expert, int32_t height) {
    expert_order o;
    char *at = static_cast<char *>(memory);
    o.start = reinterpret_cast<int32_t *>(at), at += rounded(static_cast<size_t>(n_expert + 1) * sizeof(int32_t));
    o.pairs = reinterpret_cast<int32_t *>(at), at += rounded(static_cast<size_t>(n_pairs) * sizeof(int32_t));
    o.tiles = reinterpret_cast<int2 *>(at);
    o.most_tiles = most_tiles(n_pairs, n_expert, height);
    t.start(order_kernel, dim3(1), dim3(ORDER_THREADS), static_cast<size_t>(2 * n_expert) * sizeof(int32_t), o, experts, static_cast<int32_t>(n_pairs),
            static_cast<int32_t>(n_expert), height);
    return o;
}

__global__ void combine_kernel(float *y, const float *out, const float *weights, int64_t k, int64_t d) {
    const int64_t i = blockIdx.x;
    for (int64_t j = threadIdx.x; j < d; j += blockDim.x) {
        float sum = 0.0f;
        for (int64_t s = 0; s < k; s++) sum = fmaf(weights[i * k + s], out[(i * k + s) * d + j], sum);
        y[i * d + j] = sum;
    }
}

void combine_experts(const turn &t, float *y, const float *out, const float *weights, int64_t n, int64_t k, int64_t d) {
    t.start(combine_kernel, dim3(static_cast<unsigned>(n)), dim3(256), 0, y, out, weights, k, d);
}

/* hidden[place in pairs][d_expert] = gelu(gate x) * up x, or, without an up, out[pair][rows] = down hidden. */
template <class F, bool DOWN>
__global__ void __launch_bounds__(PLAIN_THREADS) plain_experts_kernel(float *y, const float *x, const typename F::block *w, const typename F::block *up,
                                                                      int64_t rows, int64_t cols, int64_t expert_blocks, expert_order o, int32_t k) {
    DG_SHARED(float, room_w, PLAIN * PLAIN_PITCH);
    DG_SHARED(float, room_x, PLAIN * PLAIN_PITCH);
    const int2 tile = o.tiles[blockIdx.y];
    if (tile.x < 0) return;
    const int32_t end = o.start[tile.x + 1];
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * PLAIN, row = first_row + threadIdx.x % PLAIN;
    const int64_t at = tile.x * expert_blocks + first_row * (cols / F::VALUES);
    const auto x_of = [&](int i) -> const float * {
        const int32_t place = tile.y + i;
        if (place >= end) return nullptr;
        return x + (DOWN ? place : o.pairs[place] / k) * cols;
    };
    float sum[2] = {0.0f, 0.0f}, other[2] = {0.0f, 0.0f};
    plain_tile<F>(sum, w + at, cols, rows - first_row, x_of, room_w, room_x);
    if (!DOWN) plain_tile<F>(other, up + at, cols, rows - first_row, x_of, room_w, room_x);
    for (int i = 0; i < 2; i++) {
        const int32_t place = tile.y + static_cast<int32_t>(threadIdx.x / PLAIN) + i * PLAIN / 2;
        if (row >= rows || place >= end) continue;
        if (DOWN) y[o.pairs[place] * rows + row] = sum[i];
        else y[place * rows + row] = gelu_tanh(sum[i]) * other[i];
    }
}

void plain_experts(const turn &t, float *y, const float *x, const tensor *gate, const tensor *up, const tensor *down, const int32_t *experts,
                   const float *weights, int64_t n, int64_t k, void *work) {
    const expert_order order = order_experts(t, work, experts, n * k, gate->experts, PLAIN);
    float *const hidden = reinterpret_cast<float *>(static_cast<char *>(work) + expert_order_bytes(n * k, gate->experts));
    float *const out = hidden + n * k * gate->rows;
    const auto most = static_cast<unsigned>(order.most_tiles);
    for_format(gate->format->id, [&](auto format) {
        using F = decltype(format);
        using B = const typename F::block;
        t.start(plain_experts_kernel<F, false>, dim3(blocks_for(gate->rows, PLAIN), most), dim3(PLAIN_THREADS), 0, hidden, x, reinterpret_cast<B *>(gate->placed),
                reinterpret_cast<B *>(up->placed), gate->rows, gate->cols, gate->expert_bytes / static_cast<int64_t>(sizeof(B)), order, static_cast<int32_t>(k));
    });
    for_format(down->format->id, [&](auto format) {
        using F = decltype(format);
        using B = const typename F::block;
        t.start(plain_experts_kernel<F, true>, dim3(blocks_for(down->rows, PLAIN), most), dim3(PLAIN_THREADS), 0, out, static_cast<const float *>(hidden),
                reinterpret_cast<B *>(down->placed), static_cast<B *>(nullptr), down->rows, down->cols, down->expert_bytes / static_cast<int64_t>(sizeof(B)), order,
                static_cast<int32_t>(k));
    });
    combine_experts(t, y, out, weights, n, k, down->rows);
}
