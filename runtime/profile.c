#include "profile.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "error.h"
#include "model.h"
#include "op_layers.h"

_Thread_local part profile_part;
static _Thread_local int depth; /* an operation made of others is booked once, as itself */

typedef enum op_id {
#define DG_OP(name, arguments, names) OP_##name,
#include "ops.def"
#undef DG_OP
    OPS
} op_id;

static const char *const op_names[OPS] = {
#define DG_OP(name, arguments, names) #name,
#include "ops.def"
#undef DG_OP
};

static const struct {
    const char *name, *covers;
} parts[PARTS] = {
#define DG_PROFILE_PART(name, covers) {#name, covers},
#include "profile_parts.def"
#undef DG_PROFILE_PART
};

typedef struct profile {
    op_layer layer;
    atomic_ullong nanoseconds[PARTS][OPS], calls[PARTS][OPS];
} profile;

/* The part of an operation in the stage that forward.c has set. */
static part part_of(part stage, op_id op) {
    switch ((int)op) {
    case OP_attention: return PART_attention;
    case OP_embed: return PART_elementwise;
    case OP_rms_norm:
    case OP_add:
    case OP_rope: return stage == PART_head || stage == PART_condition ? stage : PART_elementwise;
    default: return stage;
    }
}

static profile *profile_of(const ops *o) { return (profile *)o->layers[OP_LAYER_PROFILE]; }

static void book(profile *p, op_id op, uint64_t began) {
    const part at = part_of(profile_part, op);
    atomic_fetch_add(&p->nanoseconds[at][op], os_nanoseconds() - began);
    atomic_fetch_add(&p->calls[at][op], 1);
}

static void wait_until_done(const ops *o, const profile *p) {
    if (o->backend->asynchronous) p->layer.below.download(o, NULL, NULL, 0);
}

#define DG_OP(name, arguments, names)                \
    static void timed_##name arguments {             \
        profile *its = profile_of(o);                \
        const uint64_t began = os_nanoseconds();     \
        depth++;                                     \
        its->layer.below.name names;                 \
        if (depth == 1) wait_until_done(o, its);     \
        depth--;                                     \
        if (depth == 0) book(its, OP_##name, began); \
    }
#include "ops.def"
#undef DG_OP

static void put_timed(op_table *table) {
#define DG_OP(name, arguments, names) table->name = timed_##name;
#include "ops.def"
#undef DG_OP
}

int dg_profile_start(dg_model *model, dg_error *error) {
    dg_profile_stop(model);
    profile *p = calloc(1, sizeof *p);
    if (!p) return fail(error, DG_ERROR_SYSTEM, "no memory for a profile");
    p->layer.replace = put_timed;
    op_layer_start(model->ops, OP_LAYER_PROFILE, &p->layer);
    return DG_OK;
}

void dg_profile_stop(dg_model *model) {
    profile *p = profile_of(model->ops);
    if (!p) return;
    op_layer_stop(model->ops, OP_LAYER_PROFILE);
    free(p);
}

bool dg_profile_read(const dg_model *model, int32_t i, dg_profile_entry *entry) {
    profile *p = profile_of(model->ops);
    if (!p || i < 0 || i >= PARTS * OPS) return false;
    const int32_t at = i / OPS, op = i % OPS;
    *entry = (dg_profile_entry){
        .part = parts[at].name,
        .op = op_names[op],
        .seconds = 1e-9 * (double)atomic_load(&p->nanoseconds[at][op]),
        .calls = (int64_t)atomic_load(&p->calls[at][op]),
    };
    return true;
}

bool dg_part_at(int32_t i, dg_part *out) {
    if (i < 0 || i >= PARTS) return false;
    *out = (dg_part){.name = parts[i].name, .covers = parts[i].covers};
    return true;
}
