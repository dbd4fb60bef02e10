/* A tile of softmax times the table: the probabilities of rows times the embeddings of ids ("words", the rows of the
 * table), in binary16 with float32 sums. A "share" is a probability before normalisation.
 *
 * WORDS of them at a time go through a ring in shared memory, STAGE columns of each as the file has them, with their
 * shares for ROWS rows. While tensor cores multiply one step, the next one's values are decoded, once for all rows.
 * Each of four warps takes 64 rows and 64 columns.
 *
 * A share is exp(z - peak), at most 1. Times SHARE_ONE it has the 11 bits of binary16 down to 2^-29 and fewer down
 * to 2^-39; what becomes nothing is below 2^-40, so that 2^18 words lose less than 2^-22 of the total, which is that
 * of the rounded shares. The table is multiplied by the power of two that takes its longest row to between 2^14 and
 * 2^15: none of its values leaves binary16, whatever the format, and all above 2^-28 of that length have 11 bits. So
 * a product is off by at most 2^-11 of itself for either side. NaN and infinity stay.
 */
#ifndef DG_CUDA_SOFTMAX_MATMUL_H
#define DG_CUDA_SOFTMAX_MATMUL_H

#include "tile.cuh"

constexpr float SHARE_ONE = 32768.0f;

/* By what a table is multiplied. square: of its longest row's length, as find_longest leaves it; any exponent will
 * do. */
__device__ inline float table_unit(float square) {
    /* the length is below 2^((exponent - 126) / 2) */
    const int32_t exponent = static_cast<int32_t>(float_to_bits(square) >> 23);
    return bits_to_float(static_cast<uint32_t>(142 - ((exponent - 125) >> 1)) << 23);
}

/* ---- Formats: which lines of a row a stage needs, and in them the values of sub-block j times `unit` ---- */

template <class C> struct coded_words {
    static constexpr int CHUNKS = C::CHUNKS, PITCH = C::PITCH;
    __device__ static bool chunk(bytes row, int stage, int columns, int c, bytes *from) {
        return C::chunk(row, stage, columns / SUB, c, from);
    }
    __device__ static void values(float (&v)[SUB], bytes p, bytes row, int stage, int j, float unit) {
        float d[2], offset = 0.0f; /* of 16 columns each; of all */
        if constexpr (C::INTEGER) {
            const stage_scales k = C::scales(p, row, stage);
            DG_UNROLL for (int h = 0; h < 2; h++) {
                const int byte = C::SUM_COLUMNS == 16 ? 2 * j + h : j;
                d[h] = k.d * unit * static_cast<float>(signed_byte(byte < 4 ? k.scale[0] : k.scale[1], byte % 4));
            }
            if constexpr (C::MINIMUMS) offset = -k.dmin * unit * static_cast<float>(k.min >> 8 * j & 255u);
        } else {
            d[0] = d[1] = C::scale(p, row, stage, j) * unit;
            if constexpr (C::OFFSETS) offset = C::offset(p, row, stage, j) * unit;
        }
        DG_UNROLL for (int t = 0; t < 4; t++) {
            uint32_t low, high;
            C::codes(p, row, stage, j, t, &low, &high);
            DG_UNROLL for (int i = 0; i < 4; i++) {
                v[4 * t + i] = fmaf(d[0], static_cast<float>(signed_byte(low, i)), offset);
                v[SUB / 2 + 4 * t + i] = fmaf(d[1], static_cast<float>(signed_byte(high, i)), offset);
            }
        }
    }
};

template <class F> struct float_words { /* rows of whole lines */
    using block = typename F::block;
    static constexpr int BYTES = sizeof(block), CHUNKS = STAGE * BYTES / LINE, PITCH = (CHUNKS | 1) * LINE;
    __device__ static bool chunk(bytes row, int stage, int columns, int c, bytes *from) {
        *from = row + stage * STAGE * BYTES + c * LINE;
        return c * LINE < columns * BYTES;
    }
    __device__ static void values(float (&v)[SUB], bytes p, bytes, int, int j, float unit) {
        constexpr int AT_ONCE = LINE / BYTES;
        DG_UNROLL for (int i = 0; i < SUB; i += AT_ONCE) {
            const uint4 line = *reinterpret_cast<const uint4 *>(p + (j * SUB + i) * BYTES);
            block some[AT_ONCE];
            memcpy(some, &line, LINE);
            DG_UNROLL for (int k = 0; k < AT_ONCE; k++) {
                F::decode(some + k, &v[i + k]);
                v[i + k] *= unit;
            }
        }
    }
};

/* Calls f() with a table's side; false where none is here: softmax times the table is made in float32 then. */
template <class F> static inline bool for_words(const gpu *g, const tensor *table, F f) {
    if (g->exact || g->architecture < 80) return false;
    if (for_codes(table->format->id, [&](auto codes) { f(coded_words<decltype(codes)>()); })) return true;
    if (table->row_bytes % LINE) return false;
    switch (table->format->id) {
    case DG_F32: f(float_words<of_f32>()); return true;
    case DG_F16: f(float_words<of_f16>()); return true;
    case DG_BF16: f(float_words<of_bf16>()); return true;
    default: return false;
    }
}

/* ---- The tile ---- */

/* Where a block's share of the work lies. */
struct softmax_task {
    const uint16_t *shares; /* [n][2 * width]: a row's are the first half of it, and a zero where width is odd */
    bytes table;            /* [width] */
    int64_t row_bytes;
    int32_t width, cols, n; /* rows that there are */
};

template <class W> struct softmax_tile {
    static constexpr int THREADS = 128, ROWS = 128, WORDS = 32, SIDE = 64, MT = SIDE / 16, NT = SIDE / 8;
    static constexpr int RING = W::PITCH > 4 * STAGE ? 3 : 4; /* what 99 KiB hold */
    /* odd numbers of 16-byte lines: rows that are read together use different banks */
    static constexpr int SHARES_PITCH = WORDS + 8, VALUES_PITCH = STAGE + 8;
    static_assert(THREADS == WORDS * STAGE_SUBS && ROWS == 2 * SIDE && STAGE == 2 * SIDE,
                  "a thread per sub-block, a warp per quarter");
    struct scratch {
        alignas(LINE) unsigned char table[RING][WORDS][W::PITCH];
        alignas(LINE) uint16_t shares[RING][ROWS][SHARES_PITCH];
        alignas(LINE) uint16_t values[2][WORDS][VALUES_PITCH];
    };
    using sums = float[MT][NT][4];

    /* sum = the tile of rows from `row` on and of columns from stage * STAGE on, over the words of steps [begin,
     * end). Each number is summed in one order, whatever n is. */
    __device__ static void run(sums &sum, scratch *r, const softmax_task &a, int32_t row, int stage, int begin, int end,
                               float unit) {
        const int columns = a.cols - stage * STAGE < STAGE ? a.cols - stage * STAGE : STAGE;
        const int row_side = warp_id() / 2 * SIDE, column_side = warp_id() % 2 * SIDE;
        const bool needed = row + row_side < a.n && column_side < columns;
        const sources from = sources_of(a, row, stage, columns);
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int n = 0; n < NT; n++) DG_UNROLL
                for (int i = 0; i < 4; i++) sum[m][n][i] = 0.0f;
        for (int step = begin; step < begin + RING - 1; step++) {
            if (step < end) fetch(r, a, from, step);
            copy_async_commit();
        }
        copy_async_wait<RING - 2>();
        block_sync();
        if (begin < end) decode(r, a, stage, columns, begin, unit);
        for (int step = begin; step < end; step++) {
            copy_async_wait<RING - 3>();
            block_sync(); /* behind it: the next step's lines, this one's values, and room for those after them */
            if (step + RING - 1 < end) fetch(r, a, from, step + RING - 1);
            copy_async_commit();
            if (step + 1 < end) decode(r, a, stage, columns, step + 1, unit);
            if (needed) multiply(sum, r->shares[step % RING] + row_side, r->values[step % 2], column_side);
        }
        copy_async_wait<0>();
    }

    /* f(row, column, sum) for each of the lane's numbers; row and column as run() counts them */
    template <class F> __device__ static void each(const sums &sum, F f) {
        const int row = warp_id() / 2 * SIDE + lane_id() / 4, column = warp_id() % 2 * SIDE + 2 * (lane_id() % 4);
        DG_UNROLL for (int m = 0; m < MT; m++) DG_UNROLL
            for (int n = 0; n < NT; n++) DG_UNROLL
                for (int i = 0; i < 4; i++) f(row + 16 * m + i / 2 * 8, column + 8 * n + i % 2, sum[m][n][i]);
    }

private:
    /* A thread fetches every fourth line of one word in WORDS, and of four rows the same eight words' shares.
     * Steps are whole lines apart, so a word's lines lie as those of the first step's do. */
    static constexpr int QUARTER = THREADS / WORDS, LINES = (W::CHUNKS + QUARTER - 1) / QUARTER, ROUNDS = ROWS / WORDS,
                         ITEMS = LINE / 2;
    struct sources {
        bytes word;
        int32_t line[LINES];
        bool needed[LINES];
        const uint16_t *share[ROUNDS];
    };
    __device__ static sources sources_of(const softmax_task &a, int32_t row, int stage, int columns) {
        const int own = threadIdx.x / QUARTER, quarter = threadIdx.x % QUARTER;
        sources s;
        s.word = a.table + own * a.row_bytes;
        DG_UNROLL for (int i = 0; i < LINES; i++) {
            bytes from = s.word;
            s.needed[i] =
                quarter + QUARTER * i < W::CHUNKS && W::chunk(s.word, stage, columns, quarter + QUARTER * i, &from);
            s.line[i] = static_cast<int32_t>(from - s.word);
        }
        DG_UNROLL for (int i = 0; i < ROUNDS; i++) {
            const int32_t that = row + own + WORDS * i;
            s.share[i] = a.shares + static_cast<int64_t>(that < a.n ? that : a.n - 1) * 2 * a.width + quarter * ITEMS;
        }
        return s;
    }

    /* Zeros where there is no word. */
    __device__ static void fetch(scratch *r, const softmax_task &a, const sources &s, int step) {
        const int at = step % RING, own = threadIdx.x / QUARTER, quarter = threadIdx.x % QUARTER, first = step * WORDS,
                  mine = first + quarter * ITEMS;
        const bytes word = s.word + first * a.row_bytes;
        DG_UNROLL for (int i = 0; i < LINES; i++) {
            const int c = quarter + QUARTER * i;
            if (W::CHUNKS % QUARTER == 0 || c < W::CHUNKS)
                copy_async<LINE>(&r->table[at][own][c * LINE], word + s.line[i], s.needed[i] && first + own < a.width);
        }
        DG_UNROLL for (int i = 0; i < ROUNDS; i++) {
            const uint16_t *const from = s.share[i] + first;
            uint16_t *const to = &r->shares[at][own + WORDS * i][quarter * ITEMS];
            if (a.width % ITEMS == 0) copy_async<LINE>(to, from, mine < a.width);
            else /* a table's last stretch: rows begin anywhere */
                for (int k = 0; k < ITEMS; k += 2) copy_async<4>(to + k, from + k, mine + k < a.width);
        }
    }

    __device__ static void decode(scratch *r, const softmax_task &a, int stage, int columns, int step, float unit) {
        /* the eight lanes that write together use different banks */
        const int word = warp_id() * 8 + lane_id() % 8, j = lane_id() / 8;
        if (j * SUB >= columns) return;
        float v[SUB];
        W::values(v, r->table[step % RING][word], a.table + word * a.row_bytes, stage, j, unit);
        uint4 *const to = reinterpret_cast<uint4 *>(&r->values[step % 2][word][j * SUB]);
        DG_UNROLL for (int i = 0; i < SUB / 8; i++)
            to[i] = make_uint4(half_pair(v[8 * i], v[8 * i + 1]), half_pair(v[8 * i + 2], v[8 * i + 3]),
                               half_pair(v[8 * i + 4], v[8 * i + 5]), half_pair(v[8 * i + 6], v[8 * i + 7]));
    }

    __device__ static void multiply(sums &sum, const uint16_t (*shares)[SHARES_PITCH],
                                    const uint16_t (*values)[VALUES_PITCH], int column) {
        const int lane = lane_id();
        DG_UNROLL for (int k = 0; k < WORDS; k += 16) {
            uint32_t a[MT][4];
            DG_UNROLL for (int m = 0; m < MT; m++)
                load_matrices(a[m], &shares[16 * m + lane % 16][k + lane / 16 * 8]);
            DG_UNROLL for (int n = 0; n < NT; n += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, &values[k + lane % 16][column + 8 * n + lane / 16 * 8]);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                DG_UNROLL for (int m = 0; m < MT; m++) {
                    mma_f16(sum[m][n], a[m], b0);
                    mma_f16(sum[m][n + 1], a[m], b1);
                }
            }
        }
    }
};

#endif
