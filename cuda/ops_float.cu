/* Norms, sums, rotations, embedding rows and routing: a few numbers per weight, bound by memory. */
#include "cuda.h"
#include "formats.cuh"

constexpr int THREADS = 256;

/* ---- Elements ---- */

template <class F> __device__ inline void for_elements(int64_t n, F f) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) f(i);
}

static dim3 element_grid(int64_t n) {
    const unsigned blocks = blocks_for(n, THREADS);
    return dim3(blocks < 4096 ? blocks : 4096);
}

__global__ void add_kernel(float *y, const float *x, const float *add, int64_t n, float scale) {
    for_elements(n, [&](int64_t i) { y[i] = (x[i] + (add ? add[i] : 0.0f)) * scale; });
}
__global__ void mul_kernel(float *y, const float *x, const float *weight, int64_t n, int64_t d, float scale) {
    for_elements(n, [&](int64_t i) { y[i] = x[i] * (weight[i % d] * scale); });
}
__global__ void gelu_mul_kernel(float *y, const float *gate, const float *up, int64_t n) {
    for_elements(n, [&](int64_t i) { y[i] = gelu_tanh(gate[i]) * up[i]; });
}
__global__ void softcap_kernel(float *x, int64_t n, float cap) {
    for_elements(n, [&](int64_t i) { x[i] = cap * tanhf(x[i] / cap) + (x[i] - x[i]); }); /* infinity is not hidden */
}
__global__ void check_finite_kernel(int32_t *nonfinite, const float *x, int64_t n, int32_t mark) {
    bool finite = true;
    for_elements(n, [&](int64_t i) { finite = finite && fabsf(x[i]) < INFINITY; });
    if (!finite) atomic_claim(nonfinite, mark);
}
__global__ void divide_kernel(float *z, const float *x, int64_t n, float by) {
    for_elements(n, [&](int64_t i) { z[i] = x[i] / by; });
}

void cuda_add(const ops *o, float *y, const float *x, const float *add, int64_t n, int64_t d, float scale) {
    launch(o, "add").start(add_kernel, element_grid(n * d), dim3(THREADS), 0, y, x, add, n * d, scale);
}
void cuda_mul(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float scale) {
    launch(o, "mul").start(mul_kernel, element_grid(n * d), dim3(THREADS), 0, y, x, weight, n * d, d, scale);
}
void cuda_gelu_mul(const ops *o, float *y, const float *gate, const float *up, int64_t n) {
    launch(o, "gelu_mul").start(gelu_mul_kernel, element_grid(n), dim3(THREADS), 0, y, gate, up, n);
}
void cuda_softcap(const ops *o, float *x, int64_t n, float cap) {
    launch(o, "softcap").start(softcap_kernel, element_grid(n), dim3(THREADS), 0, x, n, cap);
}
void cuda_check_finite(const ops *o, int32_t *nonfinite, const float *x, int64_t n, int32_t mark) {
    launch(o, "check_finite").start(check_finite_kernel, element_grid(n), dim3(THREADS), 0, nonfinite, x, n, mark);
}
void cuda_divide(const ops *o, float *z, const float *x, int64_t n, float temperature) {
    launch(o, "divide").start(divide_kernel, element_grid(n), dim3(THREADS), 0, z, x, n, temperature);
}

/* ---- Rows ---- */

/* One row per block of T threads. */
template <int T>
__global__ void __launch_bounds__(T)
    rms_norm_kernel(float *y, const float *x, const float *weight, int64_t d, float eps) {
    DG_SHARED(float, scratch, T / WARP);
    x += blockIdx.x * d;
    y += blockIdx.x * d;
    float square = 0.0f;
    for (int64_t j = threadIdx.x; j < d; j += T) square = fmaf(x[j], x[j], square);
    const float scale = 1.0f / sqrtf(block_sum<T>(square, scratch) / static_cast<float>(d) + eps);
    for (int64_t j = threadIdx.x; j < d; j += T) y[j] = x[j] * scale * (weight ? weight[j] : 1.0f);
}

void cuda_rms_norm(const ops *o, float *y, const float *x, const float *weight, int64_t n, int64_t d, float eps) {
    const launch t(o, "rms_norm");
    const dim3 rows(static_cast<unsigned>(n));
    if (d <= 512) t.start(rms_norm_kernel<64>, rows, dim3(64), 0, y, x, weight, d, eps);
    else t.start(rms_norm_kernel<THREADS>, rows, dim3(THREADS), 0, y, x, weight, d, eps);
}

template <class FORMAT>
__global__ void embed_kernel(float *y, const typename FORMAT::block *table, const int32_t *ids, int64_t d,
                             float scale) {
    const int64_t blocks = d / FORMAT::VALUES;
    const typename FORMAT::block *row = table + ids[blockIdx.x] * blocks;
    for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
        float *out = y + blockIdx.x * d + b * FORMAT::VALUES;
        FORMAT::decode(row + b, out);
        for (int i = 0; i < FORMAT::VALUES; i++) out[i] *= scale;
    }
}

void cuda_embed(const ops *o, float *y, const tensor *table, const int32_t *ids, int64_t n, float scale) {
    const launch t(o, "embed");
    for_format(table->format->id, [&](auto format) {
        using F = decltype(format);
        t.start(embed_kernel<F>, dim3(static_cast<unsigned>(n)), dim3(F::VALUES > 32 ? WARP : THREADS), 0, y,
                reinterpret_cast<const typename F::block *>(table->placed), ids, table->cols, scale);
    });
}

/* One row per block: its angles are computed once for all heads. */
__global__ void rope_kernel(float *x, int64_t heads, int64_t dim, int64_t first, const float *inverse_frequency) {
    const int64_t half_dim = dim / 2;
    x += blockIdx.x * heads * dim;
    for (int64_t j = threadIdx.x; j < half_dim; j += blockDim.x) {
        const float angle = static_cast<float>(first + blockIdx.x) * inverse_frequency[j];
        const float c = cosf(angle), s = sinf(angle);
        for (int64_t h = 0; h < heads; h++) {
            float *const low = x + h * dim + j, *const high = low + half_dim;
            const float l = *low, u = *high;
            *low = l * c - u * s;
            *high = u * c + l * s;
        }
    }
}

void cuda_rope(const ops *o, float *x, int64_t n, int64_t heads, int64_t dim, int64_t first,
               const float *inverse_frequency) {
    launch(o, "rope").start(rope_kernel, dim3(static_cast<unsigned>(n)), dim3(dim > 256 ? 256 : 128), 0, x, heads, dim,
                            first, inverse_frequency);
}

__global__ void store_kernel(__half *cache, const float *x, int64_t n) {
    for_elements(n, [&](int64_t i) { cache[i] = __float2half_rn(x[i]); });
}

void cuda_store(const ops *o, void *cache, int64_t first, const float *x, int64_t n, int64_t d) {
    if (gpu_of(o)->exact)
        return cuda_copy(o, static_cast<float *>(cache) + first * d, x, static_cast<size_t>(n * d) * sizeof *x);
    launch(o, "store")
        .start(store_kernel, element_grid(n * d), dim3(THREADS), 0, static_cast<__half *>(cache) + first * d, x, n * d);
}

/* ---- Routing ---- */

/* One row per warp and block: k times the largest that is left. */
__global__ void __launch_bounds__(WARP) route_kernel(int32_t *experts, float *weights, const float *logits,
                                                     const float *scale, int32_t n_expert, int32_t k) {
    DG_DYNAMIC_SHARED(float, left); /* [n_expert] */
    const int lane = lane_id();
    logits += static_cast<int64_t>(blockIdx.x) * n_expert;
    experts += static_cast<int64_t>(blockIdx.x) * k;
    weights += static_cast<int64_t>(blockIdx.x) * k;
    for (int e = lane; e < n_expert; e += WARP) left[e] = logits[e];
    warp_sync();
    float first = 0.0f, sum = 0.0f;
    for (int s = 0; s < k; s++) {
        float best = -INFINITY;
        int at = n_expert;
        for (int e = lane; e < n_expert; e += WARP)
            if (at == n_expert || left[e] > best) {
                if (isnan(left[e])) continue; /* taken */
                best = left[e];
                at = e;
            }
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            const float other = shuffle_xor(best, mask);
            const int other_at = shuffle_xor(at, mask);
            if (other_at < n_expert && (at == n_expert || other > best || (other == best && other_at < at))) {
                best = other;
                at = other_at;
            }
        }
        if (s == 0) first = best;
        const float share = expf(best - first);
        sum += share;
        warp_sync(); /* all have read what the next line writes */
        if (lane == 0 && at < n_expert) {
            experts[s] = at;
            weights[s] = share;
            left[at] = NAN;
        }
        warp_sync();
    }
    if (lane == 0)
        for (int s = 0; s < k; s++) weights[s] = weights[s] / sum * scale[experts[s]];
}

void cuda_route(const ops *o, int32_t *experts, float *weights, const float *logits, const float *scale, int64_t n,
                int64_t n_expert, int64_t k) {
    launch(o, "route")
        .start(route_kernel, dim3(static_cast<unsigned>(n)), dim3(WARP), static_cast<size_t>(n_expert) * sizeof(float),
               experts, weights, logits, scale, static_cast<int32_t>(n_expert), static_cast<int32_t>(k));
}

__global__ void routing_add_kernel(int64_t *counts, const int32_t *experts, int64_t n) {
    for_elements(n, [&](int64_t i) { atomic_add(&counts[experts[i]], int64_t(1)); });
}

void cuda_routing_add(const ops *o, int64_t *counts, const int32_t *experts, int64_t n) {
    launch(o, "routing_add").start(routing_add_kernel, element_grid(n), dim3(THREADS), 0, counts, experts, n);
}
void cuda_routing_read(const ops *o, int64_t *out, const int64_t *counts, int64_t n) {
    cuda_download(o, out, counts, static_cast<size_t>(n) * sizeof *out);
}
