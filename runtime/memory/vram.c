#include "vram.h"

#include <stdlib.h>
#include <string.h>

#include "demand.h"
#include "error.h"
#include "os.h"
#include "placement.h"
#include "scratch.h"

#define GIB 1073741824.0
enum {
    SLOTS = 4,                  /* buffers at least: one is filled, one used, and two take up jitter */
    SLOT = 16 << 20,            /* bytes of one, where the ring holds more of them */
};
static const double FROM_HOST = 1.5; /* memory that feeds a link is at least so many times as fast */

typedef struct vram {
    int64_t bytes, taken, reserved; /* the budget; of sessions, now and what the plan leaves them */
    dg_demand demand;               /* without sessions */
    dg_machine machine;             /* what plans take GPU and CPU for */
    bool placed;
    dg_plan plan;
    int64_t *prefer;                /* [n_layer][n_expert] tokens: those of most stay first */
    int32_t *order;                 /* [n_layer][n_expert] the experts of each layer by that */
    os_mutex *mutex;
} vram;

/* What GPU and CPU are taken for: rates that are the same for every run and any number of threads, so that plans and
 * with them tokens are too. The device knows better of itself. */
static dg_machine machine_of(const ops *o) {
    dg_machine m = {.name = "this machine",
                    .ram = (double)os_memory(),
                    .disk = 2.5e9,
                    .host = 2.5e10,
                    .pcie = 1.2e10,
                    .gpu = 3e11,
                    .gpu_ops = 5e13};
    m.cpu_ops = 1.2e11 * os_processors();
    ops_device_rated(o, &m);
    if (m.host < FROM_HOST * m.pcie) m.host = FROM_HOST * m.pcie;
    if (m.ram <= 0) m.ram = 1e15;
    return m;
}

static dg_demand demand_of(const vram *v, int64_t sessions) {
    dg_demand d = v->demand;
    d.cache_bytes = sessions;
    return d;
}

static int64_t all_experts(const vram *v) {
    int64_t all = 0;
    for (int32_t l = 0; l < v->demand.n_layer; l++) all += v->demand.block_bytes[l] * v->demand.n_expert;
    return all;
}

/* The fastest plan in which the GPU has all but experts. Where they fit too, none is left to the CPU: machine_of is
 * only a guess. What RAM does not hold is the CPU's, from the map: nothing is copied from the disk. */
static int plan_for(const vram *v, int64_t bytes, int64_t sessions, dg_plan *plan, dg_error *error) {
    const dg_demand d = demand_of(v, sessions);
    dg_machine machine = v->machine;
    machine.vram = (double)bytes;
    if (placement_fixed_vram(&d) + all_experts(v) <= bytes) machine.cpu_ops = 1.0;
    int status = dg_plan_make(&d, &machine, -1, bytes, plan, error);
    if (status == DG_OK && !plan->gpu) {
        machine.cpu_ops = 1.0;
        status = dg_plan_make(&d, &machine, -1, bytes, plan, error);
    }
    for (int32_t l = 0; l < d.n_layer; l++) {
        plan->blocks[DG_WAY_DISK_CPU][l] += plan->blocks[DG_WAY_DISK_GPU][l];
        plan->blocks[DG_WAY_DISK_GPU][l] = 0;
    }
    plan->ram_ring = 0;
    if (status == DG_OK) dg_plan_measure(&d, &machine, plan);
    return status;
}

/* Page-locked memory for what a plan copies. */
static int64_t locked_bytes(const vram *v, const dg_plan *plan) {
    int64_t bytes = 0;
    for (int32_t l = 0; l < v->demand.n_layer; l++) bytes += plan->blocks[DG_WAY_RAM_GPU][l] * v->demand.block_bytes[l];
    return bytes;
}

/* The smallest budget beside sessions of so many bytes: experts are all there, or pass through SLOTS buffers. */
static int64_t least_for(const vram *v, int64_t sessions) {
    int64_t block = 0;
    for (int32_t l = 0; l < v->demand.n_layer; l++)
        if (block < v->demand.block_bytes[l]) block = v->demand.block_bytes[l];
    const int64_t ring = SLOTS * block, all = all_experts(v);
    return placement_fixed_vram(&v->demand) + sessions + (all < ring ? all : ring);
}

/* A budget whose plan page-locks no more than so many bytes: the least, to DEMAND_VARIES bytes. */
static int64_t least_beside(const vram *v, int64_t sessions, int64_t most) {
    const dg_demand d = demand_of(v, sessions);
    int64_t enough = placement_fixed_vram(&d) + all_experts(v), too_few = v->bytes;
    while (enough - too_few > DEMAND_VARIES) {
        const int64_t middle = too_few + (enough - too_few) / 2;
        dg_plan plan;
        if (plan_for(v, middle, sessions, &plan, NULL) == DG_OK && locked_bytes(v, &plan) <= most) enough = middle;
        else too_few = middle;
    }
    return enough;
}

static double told(int64_t least) { return placement_told(least + DEMAND_VARIES); }

static int64_t usual_session(const dg_model *m) { return scratch_session_bytes(m, demand_context(m)); }

/* The plan beside sessions of so many bytes; DG_ERROR_MEMORY where RAM cannot be had for what it copies. */
static int make_plan(const dg_model *m, int64_t sessions, dg_plan *plan, dg_error *error) {
    const vram *v = m->vram;
    const int status = plan_for(v, v->bytes, sessions, plan, error);
    if (status != DG_OK) return status;
    const int64_t locked = locked_bytes(v, plan), left = dg_memory_free();
    if (left == 0 || locked <= left) return DG_OK;
    return fail(
        error, DG_ERROR_MEMORY,
        "%s: a VRAM budget of %.2f GiB leaves experts to be copied from page-locked RAM: they take %.2f GiB of it, "
        "and %.2f GiB are free; it takes that RAM, or a VRAM budget of at least %.2f GiB",
        m->file->path, (double)v->bytes / GIB, (double)locked / GIB, (double)left / GIB,
        told(least_beside(v, sessions, left)));
}

/* Experts where the plan says. */
static int place(dg_model *m, const dg_plan *plan, dg_error *error) {
    const vram *v = m->vram;
    const int32_t n = m->config.n_layer;
    int64_t block = 0;
    for (int32_t l = 0; l < n; l++) {
        const int64_t first = (int64_t)l * m->config.n_expert;
        placement_order(v->prefer + first, m->config.n_expert, v->order + first);
        if (block < v->demand.block_bytes[l]) block = v->demand.block_bytes[l];
    }
    int64_t slot = plan->vram_ring / SLOTS < SLOT ? plan->vram_ring / SLOTS : SLOT;
    if (slot < block) slot = block;
    const expert_plan p = {
        .layers = m->layers,
        .n_layer = n,
        .n_expert = m->config.n_expert,
        .n_expert_used = m->config.n_expert_used,
        .order = v->order,
        .pinned = plan->blocks[DG_WAY_VRAM],
        .streamed = plan->blocks[DG_WAY_RAM_GPU],
        .slot_bytes = slot,
        .slots = plan->vram_ring ? (int32_t)(plan->vram_ring / slot) : 0,
        .rows = scratch_rows(m),
    };
    m->ops->place_experts(m->ops, &p);
    return ops_status(m->ops, error);
}

int vram_open(dg_model *m, int64_t bytes, int64_t weights, dg_error *error) {
    int64_t available;
    m->ops->available(m->ops, &available);
    vram *v = m->vram = calloc(1, sizeof *v);
    const size_t experts = (size_t)m->config.n_layer * (size_t)m->config.n_expert;
    if (!v || !(v->mutex = os_mutex_new()) || !(v->prefer = calloc(experts, sizeof *v->prefer)) ||
        !(v->order = calloc(experts, sizeof *v->order)))
        return fail(error, DG_ERROR_SYSTEM, "%s: no memory", m->file->path);
    v->bytes = bytes ? bytes : available - dg_plan_margin((double)available, true);
    v->machine = machine_of(m->ops);
    demand_weights(m, false, &v->demand);
    v->demand.layer_bytes = 0;
    v->demand.top_bytes = weights;
    for (int32_t l = 0; l < m->config.n_layer; l++) {
        int64_t at[3];
        v->demand.block_bytes[l] = expert_layout(&m->layers[l], at);
    }
    const int64_t session = usual_session(m), least = least_for(v, session);
    if (bytes > available)
        return fail(error, DG_ERROR_MEMORY, "a VRAM budget of %.2f GiB cannot be kept: %s has %.2f GiB free",
                    (double)bytes / GIB, m->ops->name, (double)available / GIB);
    if (v->bytes < least)
        return fail(error, DG_ERROR_MEMORY,
                    "%s: %s of %.2f GiB cannot be kept: it takes at least %.2f GiB, for a context of %d tokens",
                    m->file->path, bytes ? "a VRAM budget" : "what is free of the GPU's memory,",
                    (double)v->bytes / GIB, told(least),
                    m->config.context_length < DG_PLAN_CONTEXT ? m->config.context_length : DG_PLAN_CONTEXT);
    return make_plan(m, session, &v->plan, error);
}

void vram_free(dg_model *m) {
    if (!m->vram) return;
    os_mutex_free(m->vram->mutex);
    free(m->vram->prefer);
    free(m->vram->order);
    free(m->vram);
    m->vram = NULL;
}

/* Takes a session of so many bytes, all sessions then being `taken`. The mutex is held. */
static int take(dg_model *m, int64_t taken, int64_t bytes, const char *what, dg_error *error) {
    vram *v = m->vram;
    if (taken <= v->reserved) return DG_OK;
    const int64_t placed = v->placed ? v->plan.vram_used - v->reserved : 0;
    if (v->placed ? placed + taken > v->bytes : least_for(v, taken) > v->bytes)
        return fail(
            error, DG_ERROR_MEMORY,
            "%s takes %.2f GiB, which a VRAM budget of %.2f GiB does not leave beside the weights%s: %s %.2f GiB", what,
            (double)bytes / GIB, (double)v->bytes / GIB, v->taken ? " and what other sessions take" : "",
            v->placed ? "with experts where they are it takes" : "it takes at least",
            told(v->placed ? placed + taken : least_for(v, taken)));
    if (v->placed) {
        v->plan.vram_used += taken - v->reserved;
        v->reserved = taken;
        return DG_OK;
    }
    const int64_t usual = usual_session(m), session = taken < usual && least_for(v, usual) <= v->bytes ? usual : taken;
    int status = make_plan(m, session, &v->plan, error);
    if (status == DG_OK) status = place(m, &v->plan, error);
    if (status != DG_OK) return status;
    v->placed = true;
    v->reserved = session;
    return DG_OK;
}

int vram_take(dg_model *m, int64_t bytes, const char *what, dg_error *error) {
    vram *v = m->vram;
    os_mutex_lock(v->mutex);
    const int status = take(m, v->taken + bytes, bytes, what, error);
    if (status == DG_OK) v->taken += bytes;
    os_mutex_unlock(v->mutex);
    return status;
}

void vram_give(dg_model *m, int64_t bytes) {
    os_mutex_lock(m->vram->mutex);
    m->vram->taken -= bytes;
    os_mutex_unlock(m->vram->mutex);
}

int32_t vram_context(const dg_model *m, int32_t most) {
    const vram *v = m->vram;
    os_mutex_lock(v->mutex);
    int32_t from = 1;
    while (from < most) {
        const int32_t middle = from + (most - from + 1) / 2;
        const int64_t taken = v->taken + scratch_session_bytes(m, middle);
        const bool fits = taken <= v->reserved ||
                          (v->placed ? v->plan.vram_used - v->reserved + taken : least_for(v, taken)) <= v->bytes;
        if (fits) from = middle;
        else most = middle - 1;
    }
    os_mutex_unlock(v->mutex);
    return from;
}

int64_t vram_room(const dg_model *m) {
    const vram *v = m->vram;
    os_mutex_lock(v->mutex);
    const int64_t used = v->placed ? v->plan.vram_used - v->reserved : least_for(v, 0),
                  room = v->bytes - used - v->taken;
    os_mutex_unlock(v->mutex);
    return room > 0 ? room : 1;
}

void vram_prefer(dg_model *m, const int64_t *tokens) {
    os_mutex_lock(m->vram->mutex);
    memcpy(m->vram->prefer, tokens, (size_t)m->config.n_layer * (size_t)m->config.n_expert * sizeof *tokens);
    os_mutex_unlock(m->vram->mutex);
}

bool vram_placed(const dg_model *m, dg_plan *out) {
    const vram *v = m->vram;
    os_mutex_lock(v->mutex);
    *out = v->plan;
    const bool placed = v->placed;
    os_mutex_unlock(v->mutex);
    return placed;
}
