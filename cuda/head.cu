/* The output head: of each row and chunk of the vocabulary the peak and two sums, of each row and group the likely ids.
 * From these come entropy, argmax and the draw. head.cuh has the buffers. */
#include "head.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP, PER_LANE = SELF_COND_CHUNK / WARP;
static_assert(WARPS * SELF_COND_CHUNK == SELF_COND_GROUP, "a warp takes a chunk");

/* As on the CPU: likely means within REACH nats of the peak. */
constexpr float REACH = 15.0f;

/* ---- One stretch ---- */

struct found {
    float z;
    int32_t id;
};
__device__ inline bool better(const found &a, const found &b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

/* A block takes a group of one row: logits z[n][width] of the vocabulary from `first` on. */
__global__ void DG_HOT(THREADS) group_kernel(self_cond s, const float *z, int64_t first, int32_t width, int32_t n_vocab,
                                             float cap, const float *temperature) {
    DG_SHARED(float, peaks, WARPS);
    DG_SHARED(int32_t, counts, WARPS);
    DG_SHARED(found, bests, 2 * WARPS);
    const int lane = lane_id(), warp = warp_id();
    const int64_t row = blockIdx.y;
    /* of the warp's chunk, in the stretch */
    const int32_t begin = static_cast<int32_t>(blockIdx.x) * SELF_COND_GROUP + warp * SELF_COND_CHUNK;
    const int64_t group = first / SELF_COND_GROUP + blockIdx.x, chunk = group * WARPS + warp;
    float mine[PER_LANE], peak = -INFINITY;
    DG_UNROLL for (int j = 0; j < PER_LANE; j++) {
        const int32_t at = begin + j * WARP + lane;
        mine[j] = at < width ? scaled(z[row * width + at], cap, *temperature) : -INFINITY;
        peak = mine[j] > peak ? mine[j] : peak;
    }
    peak = warp_max(peak);
    float total = 0.0f, moment = 0.0f;
    DG_UNROLL for (int j = 0; j < PER_LANE; j++) {
        if (mine[j] == -INFINITY) continue;
        const float below = mine[j] - peak, p = expf(below);
        total += p;
        moment = fmaf(below, p, moment);
    }
    total = warp_sum(total);
    moment = warp_sum(moment);
    if (lane == 0) {
        peaks[warp] = peak;
        if (chunk * SELF_COND_CHUNK < n_vocab) s.parts[chunk * s.n + row] = self_cond_part{peak, total, moment};
    }
    block_sync();
    float highest = peaks[0];
    for (int w = 1; w < WARPS; w++) highest = peaks[w] > highest ? peaks[w] : highest;
    const float bar = highest - REACH;
    int32_t count = 0;
    DG_UNROLL for (int j = 0; j < PER_LANE; j++)
        count += count_bits(lanes_where(mine[j] >= bar));
    if (lane == 0) counts[warp] = count;
    block_sync();
    int32_t before = 0, all = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += counts[w];
        all += counts[w];
    }
    self_cond_list *const list = &s.lists[group * s.n + row];
    const int32_t id = static_cast<int32_t>(first) + begin + lane;
    if (threadIdx.x == 0) list->count = all < SELF_COND_GROUP_IDS ? all : SELF_COND_GROUP_IDS;
    if (all <= SELF_COND_GROUP_IDS) { /* in the order of the ids */
        DG_UNROLL for (int j = 0; j < PER_LANE; j++) {
            const uint32_t likely = lanes_where(mine[j] >= bar);
            const int32_t at = before + count_bits(likely & ((1u << lane) - 1u));
            if (likely >> lane & 1u) {
                list->ids[at] = id + j * WARP;
                list->z[at] = mine[j];
            }
            before += count_bits(likely);
        }
        return;
    }
    for (int k = 0; k < SELF_COND_GROUP_IDS; k++) { /* a flat group: the largest, one after another */
        found best = {-INFINITY, INT32_MAX};
        DG_UNROLL for (int j = 0; j < PER_LANE; j++) {
            const found candidate = {mine[j], id + j * WARP};
            if (better(candidate, best)) best = candidate;
        }
        for (int mask = WARP / 2; mask > 0; mask /= 2) {
            const found other = {shuffle_xor(best.z, mask), shuffle_xor(best.id, mask)};
            if (better(other, best)) best = other;
        }
        found *const round = bests + k % 2 * WARPS;
        if (lane == 0) round[warp] = best;
        block_sync();
        for (int w = 0; w < WARPS; w++)
            if (better(round[w], best)) best = round[w];
        if (threadIdx.x == 0) {
            list->ids[k] = best.id;
            list->z[k] = best.z;
        }
        DG_UNROLL for (int j = 0; j < PER_LANE; j++)
            if (id + j * WARP == best.id) mine[j] = -INFINITY;
    }
}

/* ---- A row from its parts ---- */

/* Finds the thread at which the running sum passes an aim. Each thread owns a stretch of items: thread t's sum is
 * sums[t] (shared). Returns the thread and, in *before, the sum of the threads before it; every thread gets the same.
 * (blockDim.x is THREADS, but unknown to the compiler, which would unroll these loops until they spill.) */
__device__ inline int passing(const double *sums, double aim, double *before) {
    double sum = 0.0;
    int last = 0;
    double last_before = 0.0;
    for (int t = 0; t < static_cast<int>(blockDim.x); t++) {
        if (sums[t] > 0.0) {
            last = t;
            last_before = sum;
            if (sum + sums[t] > aim) break;
        }
        sum += sums[t];
    }
    *before = last_before;
    return last;
}

__device__ inline double ordered_sum(const double *sums) {
    double sum = 0.0;
    for (int t = 0; t < static_cast<int>(blockDim.x); t++) sum += sums[t];
    return sum;
}

__global__ void DG_HOT(THREADS) merge_kernel(self_cond s, dg_choice *out, const double *u) {
    DG_SHARED(float, scratch, WARPS);
    DG_SHARED(double, sums, THREADS);
    DG_SHARED(double, moment_sums, WARPS);
    DG_SHARED(double, kepts, WARPS);
    DG_SHARED(int32_t, counts, THREADS);
    DG_SHARED(int32_t, lowest, WARPS);
    const int64_t i = blockIdx.x, chunks = (s.n_vocab + SELF_COND_CHUNK - 1) / SELF_COND_CHUNK,
                  groups = (s.n_vocab + SELF_COND_GROUP - 1) / SELF_COND_GROUP;
    const int64_t each = (chunks + THREADS - 1) / THREADS, begin = threadIdx.x * each,
                  end = begin + each < chunks ? begin + each : chunks;
    float peak = -INFINITY;
    for (int64_t c = begin; c < end; c++) {
        const float p = s.parts[c * s.n + i].peak;
        peak = p > peak ? p : peak;
    }
    peak = block_max<THREADS>(peak, scratch);
    double mine = 0.0, moment = 0.0;
    const auto share_of = [&](int64_t c, double *below) {
        *below = static_cast<double>(s.parts[c * s.n + i].peak) - static_cast<double>(peak);
        return exp(*below);
    };
    for (int64_t c = begin; c < end; c++) {
        const self_cond_part sums_of = s.parts[c * s.n + i];
        double below;
        const double scale = share_of(c, &below);
        mine += static_cast<double>(sums_of.total) * scale;
        moment += (static_cast<double>(sums_of.moment) + static_cast<double>(sums_of.total) * below) * scale;
    }
    sums[threadIdx.x] = mine;
    moment = block_sum<THREADS>(moment, moment_sums);
    const double total = ordered_sum(sums), aim = u[i] * total;
    double before;
    const int owner = passing(sums, aim, &before);
    if (static_cast<int>(threadIdx.x) == owner) {
        int64_t chosen = -1;
        double chosen_aim = 0.0, sum = before;
        for (int64_t c = begin; c < end; c++) {
            double below;
            const double scale = share_of(c, &below), share = static_cast<double>(s.parts[c * s.n + i].total) * scale;
            if (!(share > 0.0)) continue;
            chosen = c;
            chosen_aim = (aim - sum) / scale;
            if (sum + share > aim) break;
            sum += share;
        }
        s.chunks[i] = static_cast<int32_t>(chosen < 0 ? 0 : chosen);
        s.aims[i] = chosen_aim;
    }

    double kept = 0.0;
    int32_t best = INT32_MAX, base = 0;
    for (int64_t g0 = 0; g0 < groups; g0 += THREADS) {
        const int64_t g = g0 + threadIdx.x;
        const self_cond_list *const list = g < groups ? &s.lists[g * s.n + i] : nullptr;
        int32_t count = 0;
        for (int32_t j = 0; list && j < list->count; j++) {
            if (list->z[j] == peak && list->ids[j] < best) best = list->ids[j];
            count += list->z[j] >= peak - REACH;
        }
        block_sync();
        counts[threadIdx.x] = count;
        block_sync();
        int32_t at = base;
        for (int t = 0; t < static_cast<int>(blockDim.x); t++) {
            if (t < static_cast<int>(threadIdx.x)) at += counts[t];
            base += counts[t];
        }
        for (int32_t j = 0; list && j < list->count; j++) {
            if (list->z[j] < peak - REACH) continue;
            if (at < SELF_COND_IDS) {
                const double share = exp(static_cast<double>(list->z[j]) - static_cast<double>(peak)) / total;
                s.ids[i * SELF_COND_IDS + at] = list->ids[j];
                s.shares[i * SELF_COND_IDS + at] = static_cast<float>(share);
                kept += share;
            }
            at++;
        }
    }
    kept = block_sum<THREADS>(kept, kepts);
    best = -block_max<THREADS>(-best, lowest);
    if (threadIdx.x) return;
    s.counts[i] = base < SELF_COND_IDS ? base : SELF_COND_IDS;
    s.dropped[i] = kept < 1.0 ? 1.0 - kept : 0.0;
    s.argmax[i] = best;
    const double entropy = log(total) - moment / total;
    const bool finite = total < INFINITY; /* NaN is not */
    if (!finite) s.argmax[i] = -1;
    out[i] =
        finite ? dg_choice{entropy > 0.0 ? static_cast<float>(entropy) : 0.0f, best, best} : dg_choice{NAN, -1, -1};
}

/* The draw of a row within its chunk, whose logits are z[n][SELF_COND_CHUNK]: the first id at which the sum passes
 * the aim. */
__global__ void DG_HOT(THREADS)
    draw_kernel(self_cond s, dg_choice *out, const float *z, float cap, const float *temperature) {
    DG_SHARED(double, shares, THREADS);
    const int64_t i = blockIdx.x, chunk = s.chunks[i], left = s.n_vocab - chunk * SELF_COND_CHUNK;
    static_assert(THREADS == SELF_COND_CHUNK, "a thread per id");
    const double peak = static_cast<double>(s.parts[chunk * s.n + i].peak);
    shares[threadIdx.x] =
        threadIdx.x < left
            ? exp(static_cast<double>(scaled(z[i * SELF_COND_CHUNK + threadIdx.x], cap, *temperature)) - peak)
            : 0.0;
    block_sync();
    if (threadIdx.x || out[i].argmax < 0) return;
    double before;
    out[i].sample = static_cast<int32_t>(chunk * SELF_COND_CHUNK) + passing(shares, s.aims[i], &before);
}

/* ---- The head ---- */

static void head_of(const launch &t, const ops *o, const head_part &canvas, const float *x, const tensor *table,
                    float cap, void *work) {
    self_cond *const s = canvas.next;
    const int64_t n = canvas.n;
    const float *const temperature = canvas.temperature;
    if (!s->started) find_longest(t, table); /* a first step is never recorded */
    s->cap = cap;
    s->temperature = temperature;
    cuda_copy(o, s->x, x, static_cast<size_t>(n * table->cols) * sizeof *x);
    for (int64_t first = 0; first < table->rows; first += SELF_COND_STRETCH) {
        const tensor view = stretch_of(table, first);
        matmul_counted(t, s->z, x, &view, n, nullptr, work);
        t.start(group_kernel, dim3(blocks_for(view.rows, SELF_COND_GROUP), rows_of(n)), dim3(THREADS), 0, *s,
                static_cast<const float *>(s->z), first, static_cast<int32_t>(view.rows),
                static_cast<int32_t>(table->rows), cap, temperature);
    }
    t.start(merge_kernel, dim3(rows_of(n)), dim3(THREADS), 0, *s, canvas.out, canvas.u);
    matmul_gathered(t, s->z, x, table, s->chunks, n, work);
    t.start(draw_kernel, dim3(rows_of(n)), dim3(THREADS), 0, *s, canvas.out, static_cast<const float *>(s->z), cap,
            temperature);
    s->started = true;
}

void cuda_head(const ops *o, const head_part *parts, int32_t count, const float *x, const tensor *table, int64_t,
               float cap, void *work) {
    const launch t(o, "head");
    for (const head_part *p = parts; p < parts + count; p++) {
        head_of(t, o, *p, x, table, cap, work);
        x += p->n * table->cols;
    }
}

void cuda_logits(const ops *o, float *y, const float *x, const tensor *table, int64_t n, float cap, int32_t *nonfinite,
                 int32_t mark, void *work, float *scratch) {
    const launch t(o, "logits");
    for (int64_t first = 0; first < table->rows; first += SELF_COND_STRETCH) {
        const tensor view = stretch_of(table, first);
        matmul_counted(t, scratch, x, &view, n, nullptr, work);
        cuda_check_finite(o, nonfinite, scratch, n * view.rows, mark);
        cuda_softcap(o, scratch, n * view.rows, cap);
        const size_t row = static_cast<size_t>(view.rows) * sizeof(float);
        if (t.g->failure == cudaSuccess)
            gpu_check(t.g,
                      cudaMemcpy2DAsync(y + first, static_cast<size_t>(table->rows) * sizeof(float), scratch, row, row,
                                        static_cast<size_t>(n), cudaMemcpyDeviceToHost, t.g->stream),
                      t.op);
    }
    if (t.g->failure == cudaSuccess) gpu_check(t.g, cudaStreamSynchronize(t.g->stream), t.op);
}

/* ---- Choices from whole rows ---- */

__global__ void __launch_bounds__(THREADS)
    choose_kernel(dg_choice *out, const float *z, int64_t n_vocab, const double *u) {
    DG_SHARED(float, scratch, WARPS);
    DG_SHARED(double, sums, THREADS);
    DG_SHARED(double, moment_sums, WARPS);
    DG_SHARED(int32_t, lowest, WARPS);
    const int64_t each = (n_vocab + THREADS - 1) / THREADS, begin = threadIdx.x * each,
                  end = begin + each < n_vocab ? begin + each : n_vocab;
    z += blockIdx.x * n_vocab;
    float peak = -INFINITY;
    for (int64_t v = begin; v < end; v++) peak = z[v] > peak ? z[v] : peak;
    peak = block_max<THREADS>(peak, scratch);
    int32_t best = INT32_MAX;
    double mine = 0.0, moment = 0.0;
    for (int64_t v = begin; v < end; v++) {
        const double below = static_cast<double>(z[v]) - static_cast<double>(peak), p = exp(below);
        if (z[v] == peak && best == INT32_MAX) best = static_cast<int32_t>(v);
        mine += p;
        if (p > 0.0) moment += below * p;
    }
    sums[threadIdx.x] = mine;
    moment = block_sum<THREADS>(moment, moment_sums);
    best = -block_max<THREADS>(-best, lowest);
    const double total = ordered_sum(sums), aim = u[blockIdx.x] * total;
    double before;
    if (static_cast<int>(threadIdx.x) != passing(sums, aim, &before)) return;
    int32_t sample = best;
    double sum = before;
    for (int64_t v = begin; v < end; v++) {
        const double p = exp(static_cast<double>(z[v]) - static_cast<double>(peak));
        if (!(p > 0.0)) continue;
        sample = static_cast<int32_t>(v);
        sum += p;
        if (sum > aim) break;
    }
    const double entropy = log(total) - moment / total;
    out[blockIdx.x] = dg_choice{entropy > 0.0 ? static_cast<float>(entropy) : 0.0f, best, sample};
}

void cuda_choose(const ops *o, dg_choice *out, const float *z, int64_t n, int64_t n_vocab, const double *u) {
    launch(o, "choose").start(choose_kernel, dim3(rows_of(n)), dim3(THREADS), 0, out, z, n_vocab, u);
}
