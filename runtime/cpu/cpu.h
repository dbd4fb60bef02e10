/* The CPU backends: the plain C reference of every op, and what each instruction set replaces. */
#ifndef DG_CPU_H
#define DG_CPU_H

#include "ops.h"

#define DG_OP(name, arguments) void reference_##name arguments;
#include "ops.def"
#undef DG_OP

/* One per instruction set, best last: puts its own functions into a table that holds the reference's, and returns its
 * name; or returns NULL and changes nothing where this processor or this build lacks the instructions. */
const char *cpu_avx2_install(ops *o);

/* Which (token, slot) pairs go to which expert: pairs[start[e] .. start[e + 1]) = token * k + slot, in rising order. */
typedef struct expert_groups {
    int32_t *start; /* [n_expert + 1] */
    int32_t *pairs; /* [n * k] */
    float *hidden;  /* [n * k][d_expert] by place in `pairs` */
    float *out;     /* [n * k][d_model] by pair */
} expert_groups;

/* Carves the groups out of the experts op's work and fills start and pairs. */
expert_groups group_by_expert(void *work, const int32_t *experts, int64_t n, int64_t k, int64_t d_model, int64_t d_expert, int64_t n_expert);

/* y[i][d] = sum over slots, in order, of weights[i][s] * out[i * k + s][d] */
void combine_experts(const ops *o, float *y, const float *out, const float *weights, int64_t n, int64_t k, int64_t d);

#endif
