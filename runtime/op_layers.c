#include "op_layers.h"

/* The operations as the backend made them: those beneath the lowest layer. */
static op_table backends_own(const ops *o) {
    for (int i = 0; i < OP_LAYERS; i++)
        if (o->layers[i]) return o->layers[i]->below;
    op_table table;
#define DG_OP(name, arguments, names) table.name = o->name;
#include "ops.def"
#undef DG_OP
    return table;
}

/* Puts the layers over these operations, from the lowest up. */
static void stack(ops *o, op_table table) {
    for (int i = 0; i < OP_LAYERS; i++) {
        if (!o->layers[i]) continue;
        o->layers[i]->below = table;
        o->layers[i]->replace(&table);
    }
#define DG_OP(name, arguments, names) o->name = table.name;
#include "ops.def"
#undef DG_OP
}

void op_layer_start(ops *o, op_layer_id id, op_layer *added) {
    const op_table table = backends_own(o);
    o->layers[id] = added;
    stack(o, table);
}

void op_layer_stop(ops *o, op_layer_id id) {
    const op_table table = backends_own(o);
    o->layers[id] = NULL;
    stack(o, table);
}
