/* Measures the time of each part of a pass: a layer over the operations, made from ops.def, that takes the time of
 * each. */
#ifndef DG_PROFILE_H
#define DG_PROFILE_H

typedef enum part {
#define DG_PROFILE_PART(name, covers) PART_##name,
#include "profile_parts.def"
#undef DG_PROFILE_PART
    PARTS
} part;

/* What this thread's operations belong to from here on. Norms and the like count as elementwise whatever is set. */
extern _Thread_local part profile_part;

#endif
