/* See quantize.cuh and half_tile.cuh. */
#include "half_tile.cuh"

constexpr int QUANTIZE_THREADS = 128;

__device__ inline void take_four(float (&v)[4], const float *x, int64_t column, int64_t cols) {
    if (column + 4 <= cols) {
        const float4 all = *reinterpret_cast<const float4 *>(x + column);
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
        for (int i = 0; i < 4; i++) v[i] = 0.0f; /* rows are whole sub-blocks */
    }
}

/* A warp per stage. */
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_32_kernel(quantized r, const float *x, int64_t n, int64_t cols) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (QUANTIZE_THREADS / WARP) + warp_id();
    if (item >= n * r.n_stages) return;
    const int lane = lane_id();
    float v[4], scale;
    take_four(v, x + item / r.n_stages * cols, item % r.n_stages * STAGE + 4 * lane, cols);
    const uint32_t codes = round_sub(v, &scale);
    quantized_stage *const to = r.stages + item;
    reinterpret_cast<uint32_t *>(to->codes)[lane] = codes;
    if (lane % 8 == 0) to->scales[lane / 8] = scale;
}

/* A warp per 256 columns: two stages under one scale. */
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize_k_kernel(quantized r, const float *x, int64_t n, int64_t cols) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * (QUANTIZE_THREADS / WARP) + warp_id(),
                  blocks = r.n_stages / 2;
    if (item >= n * blocks) return;
    const int lane = lane_id();
    float v[2][4];
    for (int h = 0; h < 2; h++)
        take_four(v[h], x + item / blocks * cols, (item % blocks * 2 + h) * STAGE + 4 * lane, cols);
    float peak = larger_or_nan(peak_of(v[0]), peak_of(v[1]));
    for (int mask = WARP / 2; mask > 0; mask /= 2) peak = larger_or_nan(peak, shuffle_xor(peak, mask));
    const float scale = peak / 127.0f;
    for (int h = 0; h < 2; h++) {
        const uint32_t codes = round_four(v[h], peak);
        quantized_stage *const to = r.stages + item * 2 + h;
        reinterpret_cast<uint32_t *>(to->codes)[lane] = codes;
        int32_t sum = dp4a(static_cast<int32_t>(codes), static_cast<int32_t>(ONES), 0);
        for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane % 8 == 0) {
            const float whole = static_cast<float>(sum) * scale;
            const uint16_t high = bf16_from_float(whole);
            to->sums.high[lane / 8] = high;
            to->sums.low[lane / 8] = bf16_from_float(whole - bf16_to_float(high));
        }
    }
    if (lane == 0) r.scales[item] = scale;
}

void quantize_rows(const launch &t, const quantized &r, const float *x, int64_t n, int64_t cols, bool integer) {
    const int64_t items = n * (integer ? r.n_stages / 2 : r.n_stages);
    t.start(integer ? quantize_k_kernel : quantize_32_kernel, dim3(blocks_for(items, QUANTIZE_THREADS / WARP)),
            dim3(QUANTIZE_THREADS), 0, r, x, n, cols);
}

/* A block per row. */
__global__ void __launch_bounds__(QUANTIZE_THREADS)
    round_halves_kernel(half_rows r, const float *x, int64_t cols, bool brain) {
    DG_SHARED(float, scratch, QUANTIZE_THREADS / WARP);
    const int64_t pitch = static_cast<int64_t>(r.n_stages) * HALF_STAGE;
    x += blockIdx.x * cols;
    float peak = 0.0f;
    for (int64_t j = threadIdx.x; j < cols; j += QUANTIZE_THREADS) peak = fmaxf(peak, fabsf(x[j]));
    peak = block_max<QUANTIZE_THREADS>(peak, scratch);
    /* the peak comes to lie in [2^7, 2^8): products of binary16 then have room on both sides */
    const uint32_t exponent = float_to_bits(peak) >> 23, within = exponent < 8 ? 8 : exponent > 253 ? 253 : exponent;
    const float by = bits_to_float((261 - within) << 23);
    for (int64_t j = threadIdx.x; j < pitch; j += QUANTIZE_THREADS) {
        const float v = j < cols ? x[j] * by : 0.0f;
        r.values[blockIdx.x * pitch + j] = brain ? bf16_from_float(v) : half_from_float(v);
    }
    if (threadIdx.x == 0) r.scales[blockIdx.x] = bits_to_float((within - 7) << 23);
}

void round_halves(const launch &t, const half_rows &r, const float *x, int64_t n, int64_t cols, bool brain) {
    t.start(round_halves_kernel, dim3(static_cast<unsigned>(n)), dim3(QUANTIZE_THREADS), 0, r, x, cols, brain);
}
