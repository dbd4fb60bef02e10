#include "budget.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "demand.h"
#include "error.h"
#include "placement.h"
#include "scratch.h"
#include "stream.h"
#include "vram.h"

#define GIB 1073741824.0
#define MIB (1 << 20)
enum {
    SLOT = 32 * MIB,        /* a buffer, where the ring holds that many */
    SLOTS = 8,              /* else so many of them */
};

struct budget {
    int64_t ram, taken, reserved; /* reserved: the most that was taken at once; weights do not grow back */
    int64_t more;                 /* what the least that is told has more than this process takes */
    dg_demand demand;             /* without sessions */
    dg_machine machine;
    dg_plan plan;                 /* that the weights follow from the next pass on */
    os_file **files;              /* [n_parts] */
    int32_t n_parts;
    int64_t *prefer;              /* [n_layer][n_expert] tokens: those of most stay first */
    bool *keep;                   /* [n_layer][n_expert] */
    int32_t *order;               /* [n_expert] */
    os_mutex *mutex;
};

static int64_t read_part(void *self, int32_t i, void *to, int64_t bytes, int64_t offset) {
    return os_file_read(((os_file **)self)[i], to, bytes, offset);
}
static int check_part(void *self, int32_t i, dg_error *error) { return os_file_check(((os_file **)self)[i], error); }
static bool copies_part(void *self, int32_t i) { return !os_file_direct(((os_file **)self)[i]); }

static const gguf *part_of(const dg_model *m, int32_t i) { return i ? m->file->others[i - 1] : m->file; }

/* Which part of the file a weight lies in. */
static int32_t part_with(const dg_model *m, const uint8_t *data) {
    int32_t i = 0;
    while (i < m->file->n_others && !(data >= part_of(m, i)->map && data < part_of(m, i)->map + part_of(m, i)->size))
        i++;
    return i;
}

/* ---- What stays ---- */

static void choose(const dg_model *m, const dg_plan *plan) {
    budget *b = m->budget;
    const int32_t n = m->config.n_expert;
    for (int32_t l = 0; l < m->config.n_layer; l++) {
        bool *keep = b->keep + (int64_t)l * n;
        memset(keep, 0, (size_t)n * sizeof *keep);
        placement_order(b->prefer + (int64_t)l * n, n, b->order);
        for (int32_t i = 0; i < plan->blocks[DG_WAY_RAM_CPU][l]; i++) keep[b->order[i]] = true;
    }
}

static void place(dg_model *m) {
    budget *b = m->budget;
    const int64_t block = stream_block_bytes(m->stream), ring = b->plan.ram_ring, granule = os_granule();
    int64_t slot = ring / SLOTS < SLOT ? ring / SLOTS : SLOT;
    slot = slot / granule * granule;
    if (slot < block) slot = block;
    choose(m, &b->plan);
    stream_place(m->stream, b->keep, slot, (int32_t)(ring / slot));
}

/* The plan beside sessions of so many bytes. */
static int plan_for(const budget *b, int64_t sessions, dg_plan *plan, dg_error *error) {
    dg_demand d = b->demand;
    d.cache_bytes = sessions;
    return dg_plan_make(&d, &b->machine, b->ram, 0, plan, error);
}

/* The least budget that a refusal names also suffices for the next process, which may hold a little more. */
static dg_demand demand_again(const budget *b, int64_t sessions) {
    dg_demand d = b->demand;
    d.cache_bytes = sessions;
    d.process_bytes += b->more;
    return d;
}

/* The planner's refusal, with that least. */
static void refuse(const budget *b, int64_t sessions, dg_error *why) {
    const dg_demand d = demand_again(b, sessions);
    dg_plan none;
    dg_plan_make(&d, &b->machine, b->ram, 0, &none, why);
}

static double least_for(const budget *b, int64_t sessions) {
    const dg_demand d = demand_again(b, sessions);
    return placement_told(placement_least_ram(&d, 0));
}

/* Without a budget memory is taken when it is touched: what is too much would end the process, not fail. So it
 * counts as taken once it is granted: what all sessions of the process were granted, and what the process held
 * before the first. */
static _Atomic int64_t granted, before;

/* Bytes of what was granted that nobody has touched yet: all but what the process holds more than before. */
static int64_t untouched(int64_t of) {
    const int64_t held = of > 0 ? os_anonymous() - before : 0;
    return held <= 0 ? of : held < of ? of - held : 0;
}

/* What is free for a further session; 0 where the system does not tell. */
static int64_t free_beside(int64_t of) {
    const int64_t left = dg_memory_free(), taken = untouched(of);
    return left == 0 ? 0 : left > taken ? left - taken : 1;
}

static int take_free(int64_t bytes, const char *what, const char *parts, dg_error *error) {
    const int64_t others = atomic_fetch_add(&granted, bytes);
    if (others == 0) before = os_anonymous();
    const int64_t left = free_beside(others), taken = untouched(others);
    if (bytes <= left || left == 0) return DG_OK;
    granted -= bytes;
    char beside[80] = "";
    if (taken > 0)
        snprintf(beside, sizeof beside, " beside %.2f GiB that other sessions may still take", (double)taken / GIB);
    return fail(error, DG_ERROR_MEMORY, "%s takes %.2f GiB%s, and %.2f GiB of memory are free%s", what,
                (double)bytes / GIB, parts, (double)left / GIB, beside);
}

int budget_take(dg_model *m, int64_t bytes, const char *what, const char *parts, dg_error *error) {
    budget *b = m->budget;
    if (m->vram) return vram_take(m, bytes, what, error);
    if (!b) return take_free(bytes, what, parts, error);
    os_mutex_lock(b->mutex);
    int status = DG_OK;
    const int64_t taken = b->taken + bytes;
    if (taken > b->reserved) {
        dg_plan plan;
        status = plan_for(b, taken, &plan, error);
        if (status == DG_ERROR_MEMORY)
            fail(error, DG_ERROR_MEMORY,
                 "%s takes %.2f GiB, which a RAM budget of %.2f GiB does not leave beside the weights%s: it takes at "
                 "least %.2f GiB",
                 what, (double)bytes / GIB, (double)b->ram / GIB, b->taken ? " and what other sessions take" : "",
                 least_for(b, taken));
        if (status == DG_OK) {
            b->reserved = taken;
            b->plan = plan;
            place(m);
        }
    }
    if (status == DG_OK) b->taken = taken;
    os_mutex_unlock(b->mutex);
    return status;
}

void budget_give(dg_model *m, int64_t bytes) {
    budget *b = m->budget;
    if (m->vram) vram_give(m, bytes);
    else if (!b) granted -= bytes;
    if (!b) return;
    os_mutex_lock(b->mutex);
    b->taken -= bytes;
    os_mutex_unlock(b->mutex);
}

static bool holds(const budget *b, int64_t sessions) {
    dg_demand d = b->demand;
    d.cache_bytes = sessions;
    return sessions <= b->reserved || placement_least_ram(&d, 0) <= b->ram;
}

int32_t budget_context(const dg_model *m, int32_t most) {
    const budget *b = m->budget;
    if (m->vram) return vram_context(m, most);
    if (b) os_mutex_lock(b->mutex);
    const int64_t left = b ? 0 : free_beside(granted);
    int32_t from = 1;
    while (from < most) {
        const int32_t middle = from + (most - from + 1) / 2;
        const int64_t bytes = scratch_session_bytes(m, middle);
        if (b ? holds(b, b->taken + bytes) : bytes <= left || left == 0) from = middle;
        else most = middle - 1;
    }
    if (b) os_mutex_unlock(b->mutex);
    return from;
}

int64_t budget_room(const dg_model *m) {
    const budget *b = m->budget;
    if (m->vram) return vram_room(m);
    if (!b) return free_beside(granted);
    os_mutex_lock(b->mutex);
    const int64_t room = b->ram - placement_least_ram(&b->demand, 0) - b->taken;
    os_mutex_unlock(b->mutex);
    return room > 0 ? room : 1;
}

/* ---- Opening ---- */

static void add_matrix(const dg_model *m, const tensor *t, int64_t rows, stream_matrix *to) {
    const int32_t i = part_with(m, t->data);
    *to = (stream_matrix){.part = i, .offset = t->data - part_of(m, i)->map, .bytes = rows * t->row_bytes};
}

static int start_stream(dg_model *m, dg_error *error) {
    budget *b = m->budget;
    const int32_t n_layer = m->config.n_layer;
    const size_t parts = (size_t)b->n_parts, tensors = (size_t)m->file->n_tensors;
    uint8_t **homes = calloc(parts, sizeof *homes);
    const char **names = calloc(parts, sizeof *names);
    stream_range *ranges = calloc(tensors + 1, sizeof *ranges);
    stream_matrix *matrices = calloc((size_t)n_layer * STREAM_MATRICES, sizeof *matrices);
    stream_layout layout = {.n_layer = n_layer,
                            .n_expert = m->config.n_expert,
                            .n_parts = b->n_parts,
                            .homes = homes,
                            .names = names,
                            .ranges = ranges,
                            .matrices = matrices};
    int status =
        homes && names && ranges && matrices ? DG_OK : fail(error, DG_ERROR_SYSTEM, "%s: no memory", m->file->path);
    const stream_reader reader = {.read = read_part, .check = check_part, .copies = copies_part, .self = b->files};
    for (int32_t i = 0; status == DG_OK && i < b->n_parts; i++) {
        const gguf *file = part_of(m, i);
        homes[i] = (uint8_t *)(uintptr_t)file->map;
        names[i] = file->path;
        if (!os_own(file->map, file->header, file->size))
            status = fail(error, DG_ERROR_SYSTEM, "%s: no address space for %llu bytes", file->path,
                          (unsigned long long)file->size);
    }
    for (size_t i = 0; status == DG_OK && i < tensors; i++) {
        const gguf_tensor *t = &m->file->tensors[i];
        const int32_t at = part_with(m, t->data);
        if (!demand_stays(m, t)) continue;
        ranges[layout.n_ranges++] =
            (stream_range){demand_layer(t), at, t->data - part_of(m, at)->map, (int64_t)t->bytes};
    }
    for (int32_t l = 0; status == DG_OK && l < n_layer; l++) {
        const struct layer *w = &m->layers[l];
        stream_matrix *to = matrices + l * STREAM_MATRICES;
        const bool fused = w->ffn_gate_up_exps.data != NULL;
        add_matrix(m, &w->ffn_gate_exps, w->ffn_gate_exps.rows * (fused ? 2 : 1), &to[0]);
        add_matrix(m, &w->ffn_down_exps, w->ffn_down_exps.rows, &to[1]);
        if (!fused) add_matrix(m, &w->ffn_up_exps, w->ffn_up_exps.rows, &to[2]);
    }
    if (status == DG_OK && !(m->stream = stream_new(&layout, &reader)))
        status = fail(error, DG_ERROR_SYSTEM, "%s: no memory", m->file->path);
    for (int32_t l = 0; status == DG_OK && l < n_layer; l++) {
        struct layer *w = &m->layers[l];
        const bool fused = w->ffn_gate_up_exps.data != NULL;
        w->ffn_gate_exps.at = stream_at(m->stream, l, 0);
        w->ffn_down_exps.at = stream_at(m->stream, l, 1);
        w->ffn_up_exps.at = stream_at(m->stream, l, fused ? 0 : 2);
        w->ffn_up_exps.shift = fused ? w->ffn_gate_exps.rows * w->ffn_gate_exps.row_bytes : 0;
    }
    free(homes);
    free(names);
    free(ranges);
    free(matrices);
    return status;
}

int budget_open(dg_model *m, int64_t ram, dg_error *error) {
    const dg_config *c = &m->config;
    const size_t experts = (size_t)c->n_layer * (size_t)c->n_expert;
    budget *b = m->budget = calloc(1, sizeof *b);
    if (!b) return fail(error, DG_ERROR_SYSTEM, "%s: no memory", m->file->path);
    b->ram = ram;
    b->n_parts = m->file->n_others + 1;
    b->files = calloc((size_t)b->n_parts, sizeof(os_file *));
    b->prefer = calloc(experts, sizeof *b->prefer);
    b->keep = calloc(experts, sizeof *b->keep);
    b->order = calloc((size_t)c->n_expert, sizeof *b->order);
    b->mutex = os_mutex_new();
    int status = b->files && b->prefer && b->keep && b->order && b->mutex
                     ? DG_OK
                     : fail(error, DG_ERROR_SYSTEM, "%s: no memory", m->file->path);
    for (int32_t i = 0; status == DG_OK && i < b->n_parts; i++)
        status = os_file_open(part_of(m, i)->path, &part_of(m, i)->identity, &b->files[i], error);
    if (status == DG_OK) status = start_stream(m, error);
    if (status != DG_OK) return status;

    /* The machine matters little here: experts that fit stay, and the ring is as deep as that is worth on common
     * ones. */
    b->machine = (dg_machine){.name = "this machine",
                              .ram = 1e15,
                              .disk = 2.5e9,
                              .host = 2.5e10,
                              .cpu_ops = 1.2e11 * pool_threads(m->ops->pool)};
    const int64_t held = os_resident(), session = scratch_session_bytes(m, demand_context(m));
    demand_session(m, demand_context(m), true, &b->demand);
    b->demand.process_bytes = demand_process(m, held);
    b->demand.cache_bytes = b->demand.work_bytes = b->demand.canvas_bytes = 0;
    b->more = demand_process(m, held + DEMAND_VARIES) - b->demand.process_bytes;
    dg_error why;
    status = plan_for(b, session, &b->plan, &why);
    if (status == DG_ERROR_MEMORY) refuse(b, session, &why);
    if (status != DG_OK) return fail(error, (dg_status)status, "%s: %s", m->file->path, why.message);
    place(m);
    return DG_OK;
}

void budget_free(dg_model *m) {
    budget *b = m->budget;
    stream_free(m->stream);
    m->stream = NULL;
    if (!b) return;
    for (int32_t i = 0; b->files && i < b->n_parts; i++) os_file_close(b->files[i]);
    os_mutex_free(b->mutex);
    free(b->files);
    free(b->prefer);
    free(b->keep);
    free(b->order);
    free(b);
    m->budget = NULL;
}

/* ---- What a caller may ask and wish ---- */

bool budget_placed(const dg_model *m, dg_plan *out) {
    const budget *b = m->budget;
    if (m->vram) return vram_placed(m, out);
    if (!b) return false;
    os_mutex_lock(b->mutex);
    *out = b->plan;
    os_mutex_unlock(b->mutex);
    return true;
}

void budget_prefer(dg_model *m, const int64_t *tokens) {
    budget *b = m->budget;
    if (m->vram) vram_prefer(m, tokens);
    if (!b) return;
    os_mutex_lock(b->mutex);
    memcpy(b->prefer, tokens, (size_t)m->config.n_layer * (size_t)m->config.n_expert * sizeof *tokens);
    place(m);
    os_mutex_unlock(b->mutex);
}

bool budget_traffic(const dg_model *m, dg_traffic *out) {
    *out = (dg_traffic){0};
    if (!m->stream) return false;
    stream_traffic(m->stream, out);
    return true;
}
