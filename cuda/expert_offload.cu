/* See expert_offload.cuh. Copies have a stream of their own and run ahead as far as the ring is deep; the CPU's part
 * has another, on which the inputs go out, a function of the host computes, and the outputs come back. Both are
 * joined within a pass, so that a step is one graph with all of it. */
#include "expert_offload.cuh"

#include "backend.h"

#include <atomic>
#include <new>
#include <string.h>
#include <vector>

/* What the host computes for one layer and n rows; graphs keep its address. */
struct beside_task {
    expert_offload *offload;
    const layer_offload *placed;
    int64_t n, k;
};

struct expert_offload {
    int32_t n_layer, n_expert, slots;
    int64_t slot_bytes, rows, k, d;
    std::vector<layer_offload> layers;
    std::vector<int32_t> order, places; /* [n_layer][n_expert] */
    struct job {
        int32_t layer, first, count; /* of its streamed experts */
    };
    std::vector<job> jobs;
    unsigned char *ring;
    cudaStream_t copies, beside;
    cudaEvent_t begun, handed, given;
    std::vector<cudaEvent_t> arrived, used; /* [slots] */
    int32_t limit, next;                    /* jobs of this pass; the one to copy next */

    /* While passes are watched: the events of this one, in pairs, and what has come together. */
    bool watched;
    std::vector<cudaEvent_t> events;
    size_t n_events;
    std::vector<size_t> copied, waited; /* the first event of each pair */
    dg_overlap sum;
    std::atomic<uint64_t> computing; /* nanoseconds of the CPU */

    /* The CPU's: rows of a pass, in page-locked memory, and what it works in. */
    const ops *cpu;
    float *x, *y, *weights;
    int32_t *experts;
    std::vector<float> gathered, made, shares;
    std::vector<int32_t> chosen, pairs;
    std::vector<unsigned char> work;
    std::vector<beside_task *> tasks;
};

const layer_offload *layer_offload_of(const gpu *g, const tensor *gate) {
    if (g->offload)
        for (const layer_offload &h : g->offload->layers)
            if (&h.weights->ffn_gate_exps == gate) return &h;
    return nullptr;
}

expert_matrix expert_matrix_of(const layer_offload *h, const tensor *w, int which) {
    return expert_matrix{w->placed, w->expert_bytes, h ? h->at : nullptr, h ? h->shift[which] : 0};
}

portion portion_here(const layer_offload *h, int32_t n_expert) {
    return portion{0, h ? h->pinned + h->streamed : n_expert, h ? h->places : nullptr};
}

/* ---- Placing ---- */

static const tensor *matrix_of(const layer *w, int which) {
    return which == 0 ? &w->ffn_gate_exps : which == 1 ? &w->ffn_up_exps : &w->ffn_down_exps;
}

static bool make_events(gpu *g, expert_offload *s) {
    const auto make = [&](cudaEvent_t *e) {
        return gpu_check(g, cudaEventCreateWithFlags(e, cudaEventDisableTiming), "place_experts");
    };
    s->arrived.resize(static_cast<size_t>(s->slots));
    s->used.resize(static_cast<size_t>(s->slots));
    bool all = make(&s->begun) && make(&s->handed) && make(&s->given);
    for (int32_t i = 0; all && i < s->slots; i++)
        all = make(&s->arrived[static_cast<size_t>(i)]) && make(&s->used[static_cast<size_t>(i)]);
    return all && gpu_check(g, cudaStreamCreateWithFlags(&s->copies, cudaStreamNonBlocking), "place_experts") &&
           gpu_check(g, cudaStreamCreateWithFlags(&s->beside, cudaStreamNonBlocking), "place_experts");
}

/* One layer's pieces, and the device's table of them. */
static bool place_layer(gpu *g, expert_offload *s, layer_offload *h) {
    const auto check = [&](cudaError_t status) { return gpu_check(g, status, "place_experts"); };
    const auto n = static_cast<size_t>(s->n_expert), piece = static_cast<size_t>(h->bytes);
    if (h->pinned && !check(cudaMalloc(reinterpret_cast<void **>(&h->here), static_cast<size_t>(h->pinned) * piece)))
        return false;
    if (h->streamed &&
        !check(cudaHostAlloc(reinterpret_cast<void **>(&h->locked), static_cast<size_t>(h->streamed) * piece, 0)))
        return false;
    if (!check(cudaMalloc(reinterpret_cast<void **>(&h->at), n * sizeof *h->at)) ||
        !check(cudaMalloc(reinterpret_cast<void **>(&h->places), n * sizeof *h->places)))
        return false;
    if (h->pinned && !check(cudaMemsetAsync(h->here, 0, static_cast<size_t>(h->pinned) * piece, g->stream)))
        return false;
    if (h->locked) memset(h->locked, 0, static_cast<size_t>(h->streamed) * piece);
    std::vector<const unsigned char *> at(n, nullptr);
    for (int32_t place = 0; place < h->pinned + h->streamed; place++) {
        const bool here = place < h->pinned;
        const int32_t e = h->order[place], i = here ? place : place - h->pinned,
                      job = h->first_job + (here ? 0 : i / h->per_job);
        unsigned char *const to = (here ? h->here : h->locked) + i * h->bytes;
        at[static_cast<size_t>(e)] = here ? to : s->ring + job % s->slots * s->slot_bytes + i % h->per_job * h->bytes;
        for (int which = 0; which < 3; which++) {
            const tensor *w = matrix_of(h->weights, which);
            const auto bytes = static_cast<size_t>(w->rows * w->row_bytes);
            const unsigned char *const from = w->data + e * w->expert_bytes;
            if (!here) memcpy(to + h->shift[which], from, bytes);
            else if (!check(cudaMemcpyAsync(to + h->shift[which], from, bytes, cudaMemcpyHostToDevice, g->stream)))
                return false;
        }
    }
    const int32_t *const places = s->places.data() + (h->order - s->order.data());
    return check(cudaMemcpyAsync(h->at, at.data(), n * sizeof *h->at, cudaMemcpyHostToDevice, g->stream)) &&
           check(cudaMemcpyAsync(h->places, places, n * sizeof *places, cudaMemcpyHostToDevice, g->stream)) &&
           check(cudaStreamSynchronize(g->stream));
}

static bool make_host_room(gpu *g, expert_offload *s, int64_t most) {
    const auto rows = static_cast<size_t>(s->rows), k = static_cast<size_t>(s->k), d = static_cast<size_t>(s->d);
    const auto lock = [&](auto **out, size_t items) {
        return gpu_check(g, cudaHostAlloc(reinterpret_cast<void **>(out), items * sizeof **out, 0), "place_experts");
    };
    s->gathered.resize(rows * k * d);
    s->made.resize(rows * k * d);
    s->shares.resize(rows * k);
    s->chosen.resize(rows * k);
    s->pairs.resize(rows * k);
    s->work.resize(experts_work(s->rows * s->k, 1, s->d, most, s->n_expert) + 64);
    return lock(&s->x, rows * d) && lock(&s->y, rows * d) && lock(&s->weights, rows * k) && lock(&s->experts, rows * k);
}

static bool place_plan(gpu *g, expert_offload *s, const expert_plan *p, const ops *cpu) {
    int64_t most = 0;
    bool beside = false;
    s->n_layer = p->n_layer, s->n_expert = p->n_expert, s->slots = p->slots, s->slot_bytes = p->slot_bytes;
    s->rows = p->rows, s->k = p->n_expert_used, s->d = p->layers[0].ffn_gate_exps.cols, s->cpu = cpu;
    s->order.assign(p->order, p->order + static_cast<size_t>(p->n_layer) * static_cast<size_t>(p->n_expert));
    s->places.resize(s->order.size());
    for (int32_t l = 0; l < p->n_layer; l++) {
        layer_offload h = {};
        h.weights = &p->layers[l];
        h.order = s->order.data() + static_cast<std::ptrdiff_t>(l) * p->n_expert;
        for (int32_t place = 0; place < p->n_expert; place++)
            s->places[static_cast<size_t>(l * p->n_expert + h.order[place])] = place;
        h.pinned = p->pinned[l], h.streamed = p->streamed[l];
        h.bytes = expert_layout(h.weights, h.shift);
        h.per_job = static_cast<int32_t>(s->slot_bytes / h.bytes);
        h.first_job = static_cast<int32_t>(s->jobs.size());
        for (int32_t i = 0; i < h.streamed; i += h.per_job) {
            s->jobs.push_back({l, i, h.streamed - i < h.per_job ? h.streamed - i : h.per_job});
            h.n_jobs++;
        }
        if (most < h.weights->ffn_gate_exps.rows) most = h.weights->ffn_gate_exps.rows;
        beside |= h.pinned + h.streamed < s->n_expert;
        s->layers.push_back(h);
    }
    if (!make_events(g, s)) return false;
    if (!s->jobs.empty() &&
        !gpu_check(g, cudaMalloc(reinterpret_cast<void **>(&s->ring), static_cast<size_t>(s->slots * s->slot_bytes)),
                   "place_experts"))
        return false;
    for (layer_offload &h : s->layers)
        if (!place_layer(g, s, &h)) return false;
    return !beside || make_host_room(g, s, most);
}

void cuda_place_experts(const ops *o, const expert_plan *p) {
    const launch t(o, "place_experts");
    if (t.g->failure != cudaSuccess || t.g->offload) return;
    t.g->offload = new (std::nothrow) expert_offload();
    if (!t.g->offload) gpu_check(t.g, cudaErrorMemoryAllocation, t.op);
    else place_plan(t.g, t.g->offload, p, o->beside);
}

void close_offload(gpu *g) {
    expert_offload *s = g->offload;
    if (!s) return;
    if (s->copies) cudaStreamDestroy(s->copies);
    if (s->beside) cudaStreamDestroy(s->beside);
    for (const layer_offload &h : s->layers) {
        cudaFree(h.here);
        cudaFree(h.at);
        cudaFree(h.places);
        if (h.locked) cudaFreeHost(h.locked);
    }
    cudaFree(s->ring);
    for (void *locked : {static_cast<void *>(s->x), static_cast<void *>(s->y), static_cast<void *>(s->weights),
                         static_cast<void *>(s->experts)})
        if (locked) cudaFreeHost(locked);
    for (cudaEvent_t e : {s->begun, s->handed, s->given})
        if (e) cudaEventDestroy(e);
    for (const auto *each : {&s->arrived, &s->used})
        for (cudaEvent_t e : *each)
            if (e) cudaEventDestroy(e);
    for (cudaEvent_t e : s->events) cudaEventDestroy(e);
    for (beside_task *task : s->tasks) delete task;
    delete s;
    g->offload = nullptr;
}

/* ---- Watching ---- */

/* A moment in a stream; its number. */
static size_t mark(gpu *g, cudaStream_t stream) {
    expert_offload *s = g->offload;
    if (s->n_events == s->events.size()) {
        cudaEvent_t e = nullptr;
        if (!gpu_check(g, cudaEventCreate(&e), "watch")) return 0;
        s->events.push_back(e);
    }
    gpu_check(g, cudaEventRecord(s->events[s->n_events], stream), "watch");
    return s->n_events++;
}

static double between(const gpu *g, size_t from, size_t to) {
    float milliseconds = 0.0f;
    cudaEventElapsedTime(&milliseconds, g->offload->events[from], g->offload->events[to]);
    return static_cast<double>(milliseconds) * 1e-3;
}

/* The stream waits for an event; watched, it is seen how long. */
static void wait_for(gpu *g, cudaEvent_t event, const char *op) {
    expert_offload *s = g->offload;
    if (g->failure != cudaSuccess) return;
    if (s->watched) s->waited.push_back(mark(g, g->stream));
    gpu_check(g, cudaStreamWaitEvent(g->stream, event, 0), op);
    if (s->watched) mark(g, g->stream);
}

/* What a pass took, once it is over. */
static void add_up(gpu *g) {
    expert_offload *s = g->offload;
    const size_t end = mark(g, g->stream);
    if (g->failure != cudaSuccess || !gpu_check(g, cudaEventSynchronize(s->events[end]), "watch")) return;
    const double wall = between(g, 0, end);
    double stalled = 0.0;
    for (size_t i : s->waited) stalled += between(g, i, i + 1);
    for (size_t i : s->copied) s->sum.copying += between(g, i, i + 1);
    s->sum.passes++;
    s->sum.wall += wall;
    s->sum.gpu += wall > stalled ? wall - stalled : 0.0;
    for (int32_t job = 0; job < s->limit; job++)
        s->sum.copied += s->jobs[static_cast<size_t>(job)].count *
                         s->layers[static_cast<size_t>(s->jobs[static_cast<size_t>(job)].layer)].bytes;
}

bool watched(const gpu *g) { return g->offload && g->offload->watched; }

bool cuda_overlap_watch(const ops *o, bool watch) {
    const launch t(o, "watch");
    expert_offload *s = t.g->offload;
    if (!s) return false;
    s->watched = watch;
    if (watch) s->sum = {}, s->computing = 0;
    return true;
}

bool cuda_overlap_read(const ops *o, dg_overlap *out) {
    const launch t(o, "watch");
    if (!t.g->offload) return false;
    *out = t.g->offload->sum;
    out->cpu = static_cast<double>(t.g->offload->computing) * 1e-9;
    return true;
}

/* ---- Copies ---- */

static size_t slot_of(const expert_offload *s, int32_t job) { return static_cast<size_t>(job % s->slots); }

/* The next job's copy, once what was in its buffer is used. */
static void copy_next(gpu *g, const char *op) {
    expert_offload *s = g->offload;
    const int32_t i = s->next++;
    const expert_offload::job &j = s->jobs[static_cast<size_t>(i)];
    const layer_offload &h = s->layers[static_cast<size_t>(j.layer)];
    if (g->failure != cudaSuccess) return;
    if (i >= s->slots) gpu_check(g, cudaStreamWaitEvent(s->copies, s->used[slot_of(s, i)], 0), op);
    if (s->watched) s->copied.push_back(mark(g, s->copies));
    gpu_check(g,
              cudaMemcpyAsync(s->ring + i % s->slots * s->slot_bytes, h.locked + j.first * h.bytes,
                              static_cast<size_t>(j.count * h.bytes), cudaMemcpyHostToDevice, s->copies),
              op);
    if (s->watched) mark(g, s->copies);
    gpu_check(g, cudaEventRecord(s->arrived[slot_of(s, i)], s->copies), op);
}

void cuda_begin_pass(const ops *o, int32_t layers, int32_t *nonfinite) {
    gpu *g = gpu_of(o);
    expert_offload *s = g->offload;
    g->lock(); /* until end_pass: the ring is one pass's */
    if (g->failure == cudaSuccess)
        gpu_check(g, cudaMemsetAsync(nonfinite, 0, sizeof *nonfinite, g->stream), "begin_pass");
    if (!s || g->failure != cudaSuccess) return;
    s->next = 0;
    s->n_events = 0;
    s->copied.clear();
    s->waited.clear();
    if (s->watched) mark(g, g->stream);
    s->limit = layers < 1 ? 0
                          : s->layers[static_cast<size_t>(layers - 1)].first_job +
                                s->layers[static_cast<size_t>(layers - 1)].n_jobs;
    if (s->limit == 0) return;
    gpu_check(g, cudaEventRecord(s->begun, g->stream), "begin_pass");
    gpu_check(g, cudaStreamWaitEvent(s->copies, s->begun, 0), "begin_pass");
    while (s->next < s->limit && s->next < s->slots) copy_next(g, "begin_pass");
}

void cuda_end_pass(const ops *o) {
    gpu *g = gpu_of(o);
    if (watched(g) && !g->forked()) add_up(g);
    g->unlock();
}

portion job_arrived(const launch &t, const layer_offload *h, int32_t job) {
    const expert_offload *s = t.g->offload;
    const expert_offload::job &j = s->jobs[static_cast<size_t>(job)];
    wait_for(t.g, s->arrived[slot_of(s, job)], t.op);
    return portion{h->pinned + j.first, h->pinned + j.first + j.count, h->places};
}

void job_used(const launch &t, int32_t job) {
    expert_offload *s = t.g->offload;
    if (t.g->failure == cudaSuccess) gpu_check(t.g, cudaEventRecord(s->used[slot_of(s, job)], t.g->stream), t.op);
    if (s->next < s->limit) copy_next(t.g, t.op);
}

/* ---- The CPU's part ---- */

/* Its pairs of token and expert as rows of their own, one expert each; then the sums of each token, in the order of
 * its slots. */
static void compute_beside(void *arg) {
    const beside_task *task = static_cast<const beside_task *>(arg);
    expert_offload *s = task->offload;
    const layer *w = task->placed->weights;
    const int32_t first = task->placed->pinned + task->placed->streamed;
    const int32_t *const places = s->places.data() + (task->placed->order - s->order.data());
    const int64_t d = s->d;
    const uint64_t began = os_nanoseconds();
    int64_t n = 0;
    for (int64_t p = 0; p < task->n * task->k; p++) {
        if (places[s->experts[p]] < first) continue;
        s->pairs[static_cast<size_t>(n)] = static_cast<int32_t>(p);
        s->chosen[static_cast<size_t>(n)] = s->experts[p];
        s->shares[static_cast<size_t>(n)] = s->weights[p];
        memcpy(&s->gathered[static_cast<size_t>(n * d)], s->x + p / task->k * d,
               static_cast<size_t>(d) * sizeof(float));
        n++;
    }
    memset(s->y, 0, static_cast<size_t>(task->n * d) * sizeof(float));
    if (n == 0) return;
    void *const work = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(s->work.data()) + 63) / 64 * 64);
    s->cpu->experts(s->cpu, s->made.data(), s->gathered.data(), &w->ffn_gate_exps, &w->ffn_up_exps, &w->ffn_down_exps,
                    s->chosen.data(), s->shares.data(), n, 1, nullptr, work);
    for (int64_t i = 0; i < n; i++) {
        float *const y = s->y + s->pairs[static_cast<size_t>(i)] / task->k * d;
        const float *const made = &s->made[static_cast<size_t>(i * d)];
        for (int64_t j = 0; j < d; j++) y[j] += made[j];
    }
    s->computing += os_nanoseconds() - began;
}

static beside_task *task_of(expert_offload *s, const layer_offload *h, int64_t n, int64_t k) {
    for (beside_task *task : s->tasks)
        if (task->placed == h && task->n == n && task->k == k) return task;
    beside_task *task = new (std::nothrow) beside_task{s, h, n, k};
    if (task) s->tasks.push_back(task);
    return task;
}

bool begin_beside(const launch &t, const layer_offload *h, float *y, const float *x, const int32_t *experts,
                  const float *weights, int64_t n, int64_t k) {
    gpu *g = t.g;
    expert_offload *s = g->offload;
    if (!h || h->pinned + h->streamed == s->n_expert) return false;
    const auto check = [&](cudaError_t status) { return gpu_check(g, status, t.op); };
    if (g->failure != cudaSuccess || !check(cudaEventRecord(s->handed, g->stream)) ||
        !check(cudaStreamWaitEvent(s->beside, s->handed, 0)))
        return true;
    for (int64_t from = 0; from < n; from += s->rows) { /* rows of many canvases, a canvas at a time */
        const int64_t rows = n - from < s->rows ? n - from : s->rows;
        const auto bytes = static_cast<size_t>(rows * s->d) * sizeof(float),
                   few = static_cast<size_t>(rows * k) * sizeof(float);
        beside_task *task = task_of(s, h, rows, k);
        if (!task && !check(cudaErrorMemoryAllocation)) break;
        if (!check(cudaMemcpyAsync(s->x, x + from * s->d, bytes, cudaMemcpyDeviceToHost, s->beside)) ||
            !check(cudaMemcpyAsync(s->experts, experts + from * k, few, cudaMemcpyDeviceToHost, s->beside)) ||
            !check(cudaMemcpyAsync(s->weights, weights + from * k, few, cudaMemcpyDeviceToHost, s->beside)) ||
            !check(cudaLaunchHostFunc(s->beside, compute_beside, task)) ||
            !check(cudaMemcpyAsync(y + from * s->d, s->y, bytes, cudaMemcpyHostToDevice, s->beside)))
            break;
    }
    check(cudaEventRecord(s->given, s->beside));
    return true;
}

void end_beside(const launch &t) { wait_for(t.g, t.g->offload->given, t.op); }
