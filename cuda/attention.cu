/* Attention over a cache, block by block of keys, with an online softmax. There are two kernels: one in binary16 on
 * tensor cores for the usual head sizes, and one in float32 for other sizes, other GPUs and exact computation. */
#include "cuda.h"

constexpr int THREADS = 128;

/* What both need of struct attention_keys. */
struct key_range {
    int64_t first, count, window;
    int32_t n_kv, n_head;
    bool causal;
};

/* As attention_span. */
__device__ inline void span_of(const key_range &s, int64_t i, int32_t *from, int32_t *to) {
    const int64_t at = s.causal ? s.first + i : s.first, begin = s.window ? at - s.window + 1 : 0;
    *to = static_cast<int32_t>(s.causal ? at + 1 : s.count);
    *from = static_cast<int32_t>(begin > 0 ? begin : 0);
}

/* ---- Any size, float32: one query and head per block ---- */

__device__ inline float number(const float *p) { return *p; }
__device__ inline float number(const __half *p) { return __half2float(*p); }

/* Dynamic shared memory: q[dim], and p[THREADS]. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    attention_kernel(float *y, const float *q, const T *k, const T *v, key_range s, int32_t dim) {
    DG_DYNAMIC_SHARED(float, scratch);
    DG_SHARED(float, peaks, THREADS / WARP);
    DG_SHARED(float, totals, THREADS / WARP);
    float *const shared_q = scratch, *const p = scratch + dim;
    const int64_t i = blockIdx.x / s.n_head, stride = static_cast<int64_t>(s.n_kv) * dim;
    const int32_t h = static_cast<int32_t>(blockIdx.x % s.n_head), kv = h * s.n_kv / s.n_head;
    int32_t from, to;
    span_of(s, i, &from, &to);
    q += static_cast<int64_t>(blockIdx.x) * dim;
    y += static_cast<int64_t>(blockIdx.x) * dim;
    k += static_cast<int64_t>(kv) * dim;
    v += static_cast<int64_t>(kv) * dim;
    for (int d = threadIdx.x; d < dim; d += THREADS) {
        shared_q[d] = q[d];
        y[d] = 0.0f; /* the sums: each thread's own columns */
    }
    block_sync();
    float peak = -INFINITY, total = 0.0f;
    for (int32_t begin = from; begin < to; begin += THREADS) {
        const int32_t j = begin + static_cast<int32_t>(threadIdx.x);
        float score = -INFINITY;
        if (j < to) {
            score = 0.0f;
            for (int d = 0; d < dim; d++) score = fmaf(shared_q[d], number(k + j * stride + d), score);
        }
        const float highest = block_max<THREADS>(score, peaks), higher = highest > peak ? highest : peak;
        const float shrink = expf(peak - higher), share = j < to ? expf(score - higher) : 0.0f;
        p[threadIdx.x] = share;
        total = fmaf(total, shrink, block_sum<THREADS>(share, totals)); /* its barrier also shows p to all */
        peak = higher;
        const int32_t n = to - begin < THREADS ? to - begin : THREADS;
        for (int d = threadIdx.x; d < dim; d += THREADS) {
            float sum = y[d] * shrink;
            for (int32_t c = 0; c < n; c++) sum = fmaf(p[c], number(v + (begin + c) * stride + d), sum);
            y[d] = sum;
        }
        block_sync();
    }
    for (int d = threadIdx.x; d < dim; d += THREADS) y[d] /= total;
}

/* ---- Tensor cores ---- */

/* A block takes ROWS (query, head) pairs that read the same KV head. Its four warps share the scores of a tile of
 * keys out by rows and keys, and the output by columns, which is what lets 512 of them fit. Tiles of keys and values
 * follow one another through a ring of three, two on their way while one is used. */
constexpr int ROWS = 32, STAGES = 3, PAD = 8; /* 8 halves: rows of ldmatrix then lie in different banks */
template <int D> struct shape {
    static constexpr int KEYS = D >= 512 ? 16 : D >= 256 ? 32 : 64; /* per tile */
    static constexpr int PITCH = D + PAD, P_PITCH = KEYS + PAD, S_PITCH = KEYS + 4;
    static constexpr int TILE = KEYS * PITCH;
    static constexpr size_t SHARED =
        sizeof(__half) * (ROWS * PITCH + STAGES * TILE + ROWS * P_PITCH) + sizeof(float) * (ROWS * S_PITCH + 3 * ROWS);
};

/* Tile t of the sequence k0, v0, k1, v1, ... of keys from `from` on. */
template <int D>
__device__ inline void fetch_tile(__half *ring, const __half *k, const __half *v, int64_t stride, int32_t from,
                                  int32_t to, int t, int tiles) {
    using S = shape<D>;
    if (t < tiles) {
        const __half *const source = t % 2 ? v : k;
        __half *const tile = ring + t % STAGES * S::TILE;
        const int32_t begin = from + t / 2 * S::KEYS;
        for (int i = threadIdx.x; i < S::KEYS * D / 8; i += THREADS) {
            const int key = i / (D / 8), d = i % (D / 8) * 8;
            const bool valid = begin + key < to;
            copy_async<16>(tile + key * S::PITCH + d, source + (valid ? begin + key : from) * stride + d, valid);
        }
    }
    copy_async_commit();
}

template <int D>
__global__ void DG_HOT(THREADS)
    attention_mma_kernel(float *y, const float *q, const __half *k, const __half *v, key_range s, int32_t n) {
    using S = shape<D>;
    constexpr int COLUMNS = D / 4, N8 = COLUMNS / 8; /* of the output per warp, and their mma tiles */
    constexpr int KEY_N8 = S::KEYS / 16;             /* mma tiles of scores per warp: half the keys of 16 rows */
    DG_DYNAMIC_SHARED(__half, scratch);
    __half *const shared_q = scratch, *const ring = shared_q + ROWS * S::PITCH, *const p = ring + STAGES * S::TILE;
    float *const scores = reinterpret_cast<float *>(p + ROWS * S::P_PITCH), *const peaks = scores + ROWS * S::S_PITCH,
                 *const totals = peaks + ROWS, *const shrinks = totals + ROWS;
    const int lane = lane_id(), warp = warp_id();
    const int32_t group = s.n_head / s.n_kv, kv = static_cast<int32_t>(blockIdx.y),
                  first_row = static_cast<int32_t>(blockIdx.x) * ROWS, rows = n * group;
    const int64_t stride = static_cast<int64_t>(s.n_kv) * D;
    const auto start_of = [&](int32_t row) {
        return (static_cast<int64_t>(row / group) * s.n_head + kv * group + row % group) * D;
    };
    k += kv * D;
    v += kv * D;

    const int32_t last_row = first_row + ROWS < rows ? first_row + ROWS - 1 : rows - 1;
    int32_t from, to, unused;
    span_of(s, first_row / group, &from, &unused);
    span_of(s, last_row / group, &unused, &to);
    const int tiles = 2 * ((to - from + S::KEYS - 1) / S::KEYS);
    fetch_tile<D>(ring, k, v, stride, from, to, 0, tiles);
    fetch_tile<D>(ring, k, v, stride, from, to, 1, tiles);

    for (int i = threadIdx.x; i < ROWS * D / 2; i += THREADS) {
        const int row = i / (D / 2), d = i % (D / 2) * 2;
        float2 pair = make_float2(0.0f, 0.0f);
        if (first_row + row < rows) {
            const float *const source = q + start_of(first_row + row) + d;
            pair = make_float2(source[0], source[1]);
        }
        const uint32_t bits = half_pair(pair.x, pair.y);
        *reinterpret_cast<uint32_t *>(shared_q + row * S::PITCH + d) = bits;
    }
    if (threadIdx.x < ROWS) {
        peaks[threadIdx.x] = -INFINITY;
        totals[threadIdx.x] = 0.0f;
    }
    float out[2][N8][4] = {};
    /* of the four threads that take a row's softmax together */
    const int my_row = threadIdx.x / 4;
    int32_t my_from = 0, my_to = 0;
    if (first_row + my_row < rows) span_of(s, (first_row + my_row) / group, &my_from, &my_to);

    for (int t = 0; t < tiles; t += 2) {
        const int32_t begin = from + t / 2 * S::KEYS;
        copy_async_wait<1>();
        block_sync();
        fetch_tile<D>(ring, k, v, stride, from, to, t + 2, tiles);
        { /* scores of rows 16 (warp % 2) .. and keys KEYS / 2 (warp / 2) .. */
            const __half *const a_row = shared_q + (warp % 2 * 16 + lane % 16) * S::PITCH + lane / 16 * 8;
            const __half *const tile = ring + t % STAGES * S::TILE + warp / 2 * (S::KEYS / 2) * S::PITCH;
            float sums[KEY_N8][4] = {};
            DG_UNROLL for (int d = 0; d < D; d += 32) {
                uint32_t a0[4], a1[4];
                load_matrices(a0, a_row + d);
                load_matrices(a1, a_row + d + 16);
                DG_UNROLL for (int j = 0; j < KEY_N8; j++) {
                    uint32_t b[4];
                    load_matrices(b, tile + (j * 8 + lane % 8) * S::PITCH + d + lane / 8 * 8);
                    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                    mma_f16(sums[j], a0, b0);
                    mma_f16(sums[j], a1, b1);
                }
            }
            DG_UNROLL for (int j = 0; j < KEY_N8; j++)
                for (int i = 0; i < 4; i++)
                    scores[(warp % 2 * 16 + lane / 4 + i / 2 * 8) * S::S_PITCH + warp / 2 * (S::KEYS / 2) + j * 8 +
                           lane % 4 * 2 + i % 2] = sums[j][i];
        }
        copy_async_wait<1>();
        block_sync();
        fetch_tile<D>(ring, k, v, stride, from, to, t + 3, tiles);
        { /* the row's softmax so far */
            float mine[S::KEYS / 4], highest = -INFINITY;
            DG_UNROLL for (int c = 0; c < S::KEYS / 4; c++) {
                const int column = c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
                const int32_t key = begin + column;
                mine[c] = key >= my_from && key < my_to ? scores[my_row * S::S_PITCH + column] : -INFINITY;
                highest = mine[c] > highest ? mine[c] : highest;
            }
            for (int mask = 1; mask < 4; mask *= 2) {
                const float other = shuffle_xor(highest, mask);
                highest = other > highest ? other : highest;
            }
            const float before = peaks[my_row], peak = highest > before ? highest : before;
            float sum = 0.0f;
            DG_UNROLL for (int c = 0; c < S::KEYS / 4; c += 2) {
                const float low = peak == -INFINITY ? 0.0f : expf(mine[c] - peak),
                            high = peak == -INFINITY ? 0.0f : expf(mine[c + 1] - peak);
                const uint32_t bits = half_pair(low, high);
                *reinterpret_cast<uint32_t *>(p + my_row * S::P_PITCH + c / 2 * 8 + threadIdx.x % 4 * 2) = bits;
                sum += low + high;
            }
            for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
            warp_sync(); /* the four have read peaks[my_row] */
            if (threadIdx.x % 4 == 0) {
                const float shrink = peak == -INFINITY ? 1.0f : expf(before - peak);
                peaks[my_row] = peak;
                shrinks[my_row] = shrink;
                totals[my_row] = fmaf(totals[my_row], shrink, sum);
            }
        }
        block_sync();
        { /* the warp's columns of the output */
            const __half *const tile =
                ring + (t + 1) % STAGES * S::TILE + lane % 16 * S::PITCH + warp * COLUMNS + lane / 16 * 8;
            DG_UNROLL for (int m = 0; m < 2; m++) {
                const float low = shrinks[m * 16 + lane / 4], high = shrinks[m * 16 + lane / 4 + 8];
                DG_UNROLL for (int j = 0; j < N8; j++) {
                    out[m][j][0] *= low;
                    out[m][j][1] *= low;
                    out[m][j][2] *= high;
                    out[m][j][3] *= high;
                }
            }
            for (int key = 0; key < S::KEYS; key += 16) {
                uint32_t a[2][4];
                for (int m = 0; m < 2; m++)
                    load_matrices(a[m], p + (m * 16 + lane % 16) * S::P_PITCH + key + lane / 16 * 8);
                DG_UNROLL for (int j = 0; j < N8; j += 2) {
                    uint32_t b[4];
                    load_matrices_transposed(b, tile + key * S::PITCH + j * 8);
                    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                    DG_UNROLL for (int m = 0; m < 2; m++) {
                        mma_f16(out[m][j], a[m], b0);
                        mma_f16(out[m][j + 1], a[m], b1);
                    }
                }
            }
        }
    }
    copy_async_wait<0>();
    DG_UNROLL for (int m = 0; m < 2; m++)
        for (int half_row = 0; half_row < 2; half_row++) {
            const int row = m * 16 + lane / 4 + half_row * 8;
            if (first_row + row >= rows) continue;
            float *const to_y = y + start_of(first_row + row) + warp * COLUMNS + lane % 4 * 2;
            const float inverse = 1.0f / totals[row];
            DG_UNROLL for (int j = 0; j < N8; j++) {
                to_y[j * 8] = out[m][j][half_row * 2] * inverse;
                to_y[j * 8 + 1] = out[m][j][half_row * 2 + 1] * inverse;
            }
        }
}

template <int D>
static void start_mma(const launch &t, float *y, const float *q, const attention_keys *keys, const key_range &s,
                      int64_t n) {
    const int64_t rows = n * (s.n_head / s.n_kv);
    t.start(attention_mma_kernel<D>, dim3(blocks_for(rows, ROWS), static_cast<unsigned>(s.n_kv)), dim3(THREADS),
            shape<D>::SHARED, y, q, static_cast<const __half *>(keys->k), static_cast<const __half *>(keys->v), s,
            static_cast<int32_t>(n));
}

void cuda_attention(const ops *o, float *y, const float *q, const attention_keys *keys, int64_t n, int64_t n_head,
                    int64_t dim) {
    const launch t(o, "attention");
    const key_range s = {
        keys->first, keys->count, keys->window, static_cast<int32_t>(keys->n_kv), static_cast<int32_t>(n_head),
        keys->causal};
    const bool cores = !t.g->exact && t.g->architecture >= 80 && n_head % keys->n_kv == 0;
    if (cores && dim == 512) return start_mma<512>(t, y, q, keys, s, n);
    if (cores && dim == 256) return start_mma<256>(t, y, q, keys, s, n);
    if (cores && dim == 128) return start_mma<128>(t, y, q, keys, s, n);
    if (cores && dim == 64) return start_mma<64>(t, y, q, keys, s, n);
    const dim3 grid(static_cast<unsigned>(n * n_head));
    const size_t shared = static_cast<size_t>(dim + THREADS) * sizeof(float);
    if (t.g->exact)
        t.start(attention_kernel<float>, grid, dim3(THREADS), shared, y, q, static_cast<const float *>(keys->k),
                static_cast<const float *>(keys->v), s, static_cast<int32_t>(dim));
    else
        t.start(attention_kernel<__half>, grid, dim3(THREADS), shared, y, q, static_cast<const __half *>(keys->k),
                static_cast<const __half *>(keys->v), s, static_cast<int32_t>(dim));
}
