/* Layers over the operations of a table: while one is on, some operations are its own, which call those beneath it.
 * They stand in the order of op_layer_id, whichever was started first, and any of them can be stopped. A table without
 * layers is as its backend made it. */
#ifndef DG_OP_LAYERS_H
#define DG_OP_LAYERS_H

#include "ops.h"

/* The first member of what a layer keeps; its operations find it in o->layers. */
typedef struct op_layer {
    void (*replace)(op_table *table); /* puts the layer's operations in the place of the table's */
    op_table below;                   /* what they call; set by the functions below */
} op_layer;

/* Both only while no operation runs. The layer is the caller's, and stands until it is stopped. */
void op_layer_start(ops *o, op_layer_id id, op_layer *added);
void op_layer_stop(ops *o, op_layer_id id);

#endif
