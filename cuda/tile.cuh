/* A tile: the part of a product of quantised weights and rounded activations (int8) that one thread block computes.
 *
 * Stages of STAGE columns are copied into a ring in shared memory, as they are in the file, while earlier stages are
 * multiplied. In a product of the tensor cores, weights are the rows and tokens are the columns. A warp computes
 * MT x NT products [m][n] of 16 rows and 8 tokens each. Lane l (0 .. 31) of the warp holds four numbers i of each
 * product:
 *
 *                     token 2 (l % 4)   token 2 (l % 4) + 1
 *     row l / 4            i = 0               i = 1
 *     row l / 4 + 8        i = 2               i = 3
 *
 * so for example, lanes 0 to 3 hold row 0:    tokens 0 1 | 2 3 | 4 5 | 6 7
 *                 lanes 4 to 7 hold row 1:    tokens 0 1 | 2 3 | 4 5 | 6 7
 *
 * The order of additions is the same for any tile: sums of integers are exact, and floats are added stage by stage.
 */
#ifndef DG_CUDA_TILE_H
#define DG_CUDA_TILE_H

#include "quantize.cuh"

/* The sizes of a tile, and the numbers that a lane holds. */
template <int WARPS_M, int WARPS_N, int MT, int NT> struct tile_places {
    static constexpr int ROWS = WARPS_M * MT * 16, TOKENS = WARPS_N * NT * 8, THREADS = WARPS_M * WARPS_N * WARP;

    /* Calls f(row, token, m, n, i) for each number sum[m][n][i] of the lane. row and token are counted within the tile.
     */
    template <class F> __device__ static void each(F f) {
        const int lane = lane_id();
        const int row = warp_id() / WARPS_N * (MT * 16) + lane / 4,
                  token = warp_id() % WARPS_N * (NT * 8) + 2 * (lane % 4);
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int n = 0; n < NT; n++) DG_UNROLL
                for (int i = 0; i < 4; i++) f(row + 16 * m + 8 * (i / 2), token + 8 * n + i % 2, m, n, i);
    }
};

/* Conversion of an integer sum to a float without an instruction for it: the sum starts at EXACT_START, which as the
 * bits of a float is 1.5 * 2^23 = 12582912. A sum of up to 2^22 is then the difference of that float and 12582912. */
constexpr int32_t EXACT_START = 0x4b400000;
__device__ inline float exact_float(int32_t sum) { return bits_to_float(static_cast<uint32_t>(sum)) - 12582912.0f; }
__device__ inline int32_t signed_byte(uint32_t four, int i) { return static_cast<int32_t>(four << (24 - 8 * i)) >> 24; }
__device__ inline uint32_t bf16_pair(float low, float high) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}
__device__ inline float bf16_part(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

template <class C, bool TENSOR, int WARPS_M, int WARPS_N, int MT, int NT, int RING> struct tile {
    using places = tile_places<WARPS_M, WARPS_N, MT, NT>;
    using input = quantized;
    static constexpr int ROWS = places::ROWS, TOKENS = places::TOKENS, THREADS = places::THREADS;
    static constexpr int BLOCKS = !TENSOR ? 1 : MT == 1 ? 4 : 2; /* thread blocks per multiprocessor, for registers */
    struct sums {
        float sum[MT][NT][4];     /* the result so far */
        int32_t whole[MT][NT][4]; /* for K-quants: the integer sums of the current 256 columns */
    };

    /* Shared memory. */
    struct scratch {
        alignas(LINE) unsigned char weights[RING][ROWS][C::PITCH];
        quantized_stage x[RING][TOKENS];
        float scales[RING][TOKENS];
        bytes rows[ROWS];
        int32_t tokens[TOKENS];
    };

    /* Computes the tile: row_of(i) returns the address of weight row i (0 .. ROWS - 1), token_of(i) the row of x for
     * token i (0 .. TOKENS - 1); both must be valid for all i. All threads of the block call this, and may use the
     * scratch memory afterwards. */
    template <class W, class X>
    __device__ static void run(sums &s, scratch *r, const quantized &x, int cols, W row_of, X token_of) {
        const int subs = cols / SUB;
        for (int i = threadIdx.x; i < ROWS; i += THREADS) r->rows[i] = row_of(i);
        for (int i = threadIdx.x; i < TOKENS; i += THREADS) r->tokens[i] = token_of(i);
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int n = 0; n < NT; n++) DG_UNROLL
                for (int i = 0; i < 4; i++) {
                    s.sum[m][n][i] = 0.0f;
                    s.whole[m][n][i] = 0;
                }
        block_sync();
        const int stages = x.n_stages;
        for (int i = 0; i < RING - 1; i++) {
            if (i < stages) fetch(r, x, i, subs);
            copy_async_commit();
        }
        for (int i = 0; i < stages; i++) {
            copy_async_wait<RING - 2>();
            block_sync();
            if (i + RING - 1 < stages) fetch(r, x, i + RING - 1, subs);
            copy_async_commit();
            multiply(s, r, i, subs - i * STAGE_SUBS);
        }
        copy_async_wait<0>();
        block_sync();
    }

    /* Starts the copies of a stage of weights and activations to shared memory. subs: sub-blocks of a row. */
    __device__ static void fetch(scratch *r, const quantized &x, int stage, int subs) {
        const int at = stage % RING, left = subs - stage * STAGE_SUBS;
        DG_UNROLL for (int first = 0; first < ROWS * C::CHUNKS; first += THREADS) {
            const int i = first + static_cast<int>(threadIdx.x), row = i / C::CHUNKS, c = i % C::CHUNKS;
            if (ROWS * C::CHUNKS % THREADS && i >= ROWS * C::CHUNKS) break;
            bytes from;
            const bool needed = C::chunk(r->rows[row], stage, left < STAGE_SUBS ? left : STAGE_SUBS, c, &from);
            copy_async<LINE>(&r->weights[at][row][c * LINE], from, needed);
        }
        constexpr int LINES = sizeof(quantized_stage) / LINE;
        DG_UNROLL for (int first = 0; first < TOKENS * LINES; first += THREADS) {
            const int i = first + static_cast<int>(threadIdx.x), token = i / LINES, c = i % LINES;
            if (TOKENS * LINES % THREADS && i >= TOKENS * LINES) break;
            copy_async<LINE>(
                reinterpret_cast<unsigned char *>(&r->x[at][token]) + c * LINE,
                reinterpret_cast<bytes>(x.stages + static_cast<int64_t>(r->tokens[token]) * x.n_stages + stage) +
                    c * LINE);
        }
        if (C::INTEGER)
            for (int i = threadIdx.x; i < TOKENS; i += THREADS)
                copy_async<4>(&r->scales[at][i],
                              x.scales + static_cast<int64_t>(r->tokens[i]) * (x.n_stages / 2) + stage / 2);
    }

    /* Multiplies a stage and adds it to the sums. left: the sub-blocks from this stage to the end of the row. */
    __device__ static void multiply(sums &s, const scratch *r, int stage, int left) {
        const int at = stage % RING, lane = lane_id(), group = lane / 4, t = lane % 4;
        const int row = warp_id() / WARPS_N * (MT * 16) + group, first = warp_id() % WARPS_N * (NT * 8);
        const quantized_stage *const x = &r->x[at][first];
        bytes p[MT][2], origin[MT][2]; /* the lane's rows in shared memory, and in device memory */
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int h = 0; h < 2; h++) {
                p[m][h] = r->weights[at][row + 16 * m + 8 * h];
                origin[m][h] = r->rows[row + 16 * m + 8 * h];
            }
        stage_scales k[MT][2];
        if constexpr (C::INTEGER) {
            DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                for (int h = 0; h < 2; h++) k[m][h] = C::scales(p[m][h], origin[m][h], stage);
        }
        if constexpr (TENSOR) with_mma(s, p, origin, k, x, stage, left);
        else with_dp4a(s, p, origin, k, x, stage, left);
        if constexpr (C::MINIMUMS) minimums(s, k, x);
        if constexpr (C::INTEGER) {
            if (stage % 2 == 0) return;
            DG_UNROLL for (int n = 0; n < NT; n++) {
                const float scale[2] = {r->scales[at][first + 8 * n + 2 * t], r->scales[at][first + 8 * n + 2 * t + 1]};
                DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                    for (int i = 0; i < 4; i++) {
                        s.sum[m][n][i] =
                            fmaf(static_cast<float>(s.whole[m][n][i]), k[m][i / 2].d * scale[i % 2], s.sum[m][n][i]);
                        s.whole[m][n][i] = 0;
                    }
            }
        }
    }

    /* Adds the integer sums of a sub-block j to the tile's sums; with scales for 16 columns, of half a sub-block. */
    __device__ static void take(sums &s, int m, int n, int j, const int32_t (&product)[4], const stage_scales (&k)[2],
                                int side) {
        DG_UNROLL for (int i = 0; i < 4; i++) {
            const int byte = C::SUM_COLUMNS == 16 ? 2 * j + side : j;
            s.whole[m][n][i] += product[i] * signed_byte(byte < 4 ? k[i / 2].scale[0] : k[i / 2].scale[1], byte % 4);
        }
    }
    __device__ static void take(sums &s, int m, int n, const int32_t (&product)[4], const float (&d)[2],
                                const float (&scale)[2]) {
        DG_UNROLL for (int i = 0; i < 4; i++)
            s.sum[m][n][i] = fmaf(exact_float(product[i]), d[i / 2] * scale[i % 2], s.sum[m][n][i]);
    }

    __device__ static void with_mma(sums &s, const bytes (&p)[MT][2], const bytes (&origin)[MT][2],
                                    const stage_scales (&k)[MT][2], const quantized_stage *x, int stage, int left) {
        const int lane = lane_id(), t = lane % 4;
        uint32_t a[MT][STAGE_SUBS][4];
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int h = 0; h < 2; h++) DG_UNROLL
                for (int j = 0; j < STAGE_SUBS; j++)
                    C::codes(p[m][h], origin[m][h], stage, j, t, &a[m][j][h], &a[m][j][h + 2]);
        DG_UNROLL for (int pair = 0; pair < STAGE_SUBS; pair += 2) {
            if (pair >= left) break;
            float d[MT][2][2], offset[MT][2][2]; /* [sub-block][row] */
            if constexpr (!C::INTEGER) {
                DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                    for (int i = 0; i < 4; i++) {
                        d[m][i / 2][i % 2] = C::scale(p[m][i % 2], origin[m][i % 2], stage, pair + i / 2);
                        if constexpr (C::OFFSETS)
                            offset[m][i / 2][i % 2] = C::offset(p[m][i % 2], origin[m][i % 2], stage, pair + i / 2);
                    }
            }
            DG_UNROLL for (int n = 0; n < NT; n++) {
                uint32_t both[4]; /* each lane gives the address of token lane % 8, at quarter lane / 8 of 64 columns */
                load_matrices(both, x[8 * n + lane % 8].codes + pair * SUB + lane / 8 * LINE);
                DG_UNROLL for (int jj = 0; jj < 2; jj++) {
                    const int j = pair + jj;
                    const uint32_t b[2] = {both[2 * jj], both[2 * jj + 1]};
                    if (j >= left) break;
                    if constexpr (C::INTEGER) {
                        DG_UNROLL for (int m = 0; m < MT; m++) {
                            if constexpr (C::SUM_COLUMNS == 16) {
                                DG_UNROLL for (int side = 0; side < 2; side++) {
                                    int32_t product[4] = {0, 0, 0, 0};
                                    mma_s8_short(product, a[m][j][2 * side], a[m][j][2 * side + 1], b[side]);
                                    take(s, m, n, j, product, k[m], side);
                                }
                            } else {
                                int32_t product[4] = {0, 0, 0, 0};
                                mma_s8(product, a[m][j], b);
                                take(s, m, n, j, product, k[m], 0);
                            }
                        }
                    } else {
                        const float scale[2] = {x[8 * n + 2 * t].scales[j], x[8 * n + 2 * t + 1].scales[j]};
                        float sum[2] = {0.0f, 0.0f};
                        if constexpr (C::OFFSETS) { /* the sums of the activations, as a product with ones */
                            const uint32_t ones[4] = {ONES, ONES, ONES, ONES};
                            int32_t all[4] = {EXACT_START, EXACT_START, EXACT_START, EXACT_START};
                            mma_s8(all, ones, b);
                            for (int i = 0; i < 2; i++) sum[i] = exact_float(all[i]) * scale[i];
                        }
                        DG_UNROLL for (int m = 0; m < MT; m++) {
                            int32_t product[4] = {EXACT_START, EXACT_START, EXACT_START, EXACT_START};
                            mma_s8(product, a[m][j], b);
                            take(s, m, n, product, d[m][jj], scale);
                            if constexpr (C::OFFSETS) {
                                DG_UNROLL for (int i = 0; i < 4; i++)
                                    s.sum[m][n][i] = fmaf(offset[m][jj][i / 2], sum[i % 2], s.sum[m][n][i]);
                            }
                        }
                    }
                }
            }
        }
    }

    /* Computes the same numbers without tensor cores: each lane its own four numbers, one sub-block at a time. */
    __device__ static void with_dp4a(sums &s, const bytes (&p)[MT][2], const bytes (&origin)[MT][2],
                                     const stage_scales (&k)[MT][2], const quantized_stage *x, int stage, int left) {
        const int t = lane_id() % 4, count = left < STAGE_SUBS ? left : STAGE_SUBS;
        for (int j = 0; j < count; j++) { /* not unrolled: that would need too many registers */
            uint32_t a[MT][2][8];
            float d[MT][2], offset[MT][2];
            DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                for (int h = 0; h < 2; h++) {
                    DG_UNROLL for (int i = 0; i < 4; i++)
                        C::codes(p[m][h], origin[m][h], stage, j, i, &a[m][h][i], &a[m][h][i + 4]);
                    if constexpr (!C::INTEGER) d[m][h] = C::scale(p[m][h], origin[m][h], stage, j);
                    if constexpr (C::OFFSETS) offset[m][h] = C::offset(p[m][h], origin[m][h], stage, j);
                }
            DG_UNROLL for (int n = 0; n < NT; n++) {
                uint32_t b[2][8];
                float scale[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
                DG_UNROLL for (int e = 0; e < 2; e++) {
                    const quantized_stage *const token = x + 8 * n + 2 * t + e;
                    DG_UNROLL for (int i = 0; i < 2; i++) {
                        const uint4 four = *reinterpret_cast<const uint4 *>(token->codes + j * SUB + i * LINE);
                        b[e][4 * i] = four.x, b[e][4 * i + 1] = four.y, b[e][4 * i + 2] = four.z,
                                 b[e][4 * i + 3] = four.w;
                    }
                    if constexpr (!C::INTEGER) scale[e] = token->scales[j];
                    if constexpr (C::OFFSETS) {
                        int32_t all = 0;
                        DG_UNROLL for (int i = 0; i < 8; i++)
                            all = dp4a(static_cast<int32_t>(ONES), static_cast<int32_t>(b[e][i]), all);
                        sum[e] = static_cast<float>(all) * scale[e];
                    }
                }
                DG_UNROLL for (int m = 0; m < MT; m++) {
                    constexpr int SIDES = C::SUM_COLUMNS == 16 ? 2 : 1;
                    DG_UNROLL for (int side = 0; side < SIDES; side++) {
                        int32_t product[4];
                        DG_UNROLL for (int i = 0; i < 4; i++) {
                            product[i] = C::INTEGER ? 0 : EXACT_START;
                            DG_UNROLL for (int w = 0; w < 8 / SIDES; w++)
                                product[i] = dp4a(static_cast<int32_t>(a[m][i / 2][side * 4 + w]),
                                                  static_cast<int32_t>(b[i % 2][side * 4 + w]), product[i]);
                        }
                        if constexpr (C::INTEGER) take(s, m, n, j, product, k[m], side);
                        else take(s, m, n, product, d[m], scale);
                    }
                    if constexpr (C::OFFSETS) {
                        DG_UNROLL for (int i = 0; i < 4; i++)
                            s.sum[m][n][i] = fmaf(offset[m][i / 2], sum[i % 2], s.sum[m][n][i]);
                    }
                }
            }
        }
    }

    /* Subtracts minimums times the sums of the activations, for the four sub-blocks of a stage. With tensor cores, each
     * factor is split into two bfloat16, high + low, and one product of 16 columns computes
     * (high + low) (high + low); the relative error is below 2^-16. */
    __device__ static void minimums(sums &s, const stage_scales (&k)[MT][2], const quantized_stage *x) {
        const int t = lane_id() % 4, group = lane_id() / 4;
        if constexpr (TENSOR) {
            uint32_t a[MT][4];
            DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                for (int h = 0; h < 2; h++) {
                    const uint32_t two = k[m][h].min >> t % 2 * 16;
                    const float first = -k[m][h].dmin * static_cast<float>(two & 255u),
                                second = -k[m][h].dmin * static_cast<float>(two >> 8 & 255u);
                    a[m][h] = t < 2 ? bf16_pair(first, second)
                                    : bf16_pair(first - bf16_part(first), second - bf16_part(second));
                    a[m][h + 2] = a[m][h];
                }
            DG_UNROLL for (int n = 0; n < NT; n++) {
                const quantized_stage *const token = x + 8 * n + group;
                const uint32_t b[2] = {reinterpret_cast<const uint32_t *>(token->sums.high)[t % 2],
                                       reinterpret_cast<const uint32_t *>(token->sums.low)[t % 2]};
                DG_UNROLL for (int m = 0; m < MT; m++)
                    mma_bf16(s.sum[m][n], a[m], b);
            }
        } else {
            DG_UNROLL for (int n = 0; n < NT; n++) DG_UNROLL
                for (int j = 0; j < STAGE_SUBS; j++) {
                    float sum[2];
                    for (int e = 0; e < 2; e++) {
                        const quantized_stage *const token = x + 8 * n + 2 * t + e;
                        sum[e] = bf16_to_float(token->sums.high[j]) + bf16_to_float(token->sums.low[j]);
                    }
                    DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
                        for (int i = 0; i < 4; i++)
                            s.sum[m][n][i] =
                                fmaf(-k[m][i / 2].dmin * static_cast<float>(k[m][i / 2].min >> 8 * j & 255u),
                                     sum[i % 2], s.sum[m][n][i]);
                }
        }
    }

    template <class F> __device__ static void each(F f) { places::each(f); }
};

#endif
