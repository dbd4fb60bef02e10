/* The CPU backends: operations that all share, the plain C reference of all others, and the faster versions that each
 * instruction set has. */
#ifndef DG_CPU_H
#define DG_CPU_H

#include "ops.h"

#define DG_OP(name, arguments, names) void reference_##name arguments;
#define DG_HOST_OP(name, arguments, names) void host_##name arguments;
#include "ops.def"
#undef DG_OP

/* An instruction set of isa.def. In a table with the reference's functions, `simd` replaces those that the set computes
 * faster in float32; then `gemm` replaces the products that round activations to 8 bits. */
typedef void (*ops_install)(ops *o);
typedef struct isa {
    const char *name; /* "avx2" */
    bool (*usable)(void); /* this processor and its operating system have it */
    ops_install simd, gemm;
} isa;

typedef enum isa_id {
#define DG_ISA(name, float_code, products, flags, usable) ISA_##name,
#include "isa.def"
#undef DG_ISA
    ISAS
} isa_id;
extern const isa isas[ISAS + 1]; /* best first; the last is no set, for architectures without any */

#define DG_ISA(name, float_code, products, flags, usable) void simd_install_##name(ops *o), gemm_install_##name(ops *o);
#include "isa.def"
#undef DG_ISA

/* Attention processes (query, head) rows and keys in blocks: as many rows as fit into L2 together with the keys. */
enum { ATTENTION_ROWS = 240, ATTENTION_KEYS = 128, ATTENTION_ROW_FLOATS = 120 * 512 };
static inline int64_t attention_rows(int64_t dim) {
    return dim * ATTENTION_ROWS <= ATTENTION_ROW_FLOATS ? ATTENTION_ROWS : (ATTENTION_ROW_FLOATS / dim + 11) / 12 * 12;
}

/* The floats of scratch memory that attention needs. */
static inline int64_t attention_scratch(int64_t dim) {
    return (2 * ATTENTION_KEYS + dim) * attention_rows(dim) + ATTENTION_KEYS * ((dim + 63) / 64 * 64);
}

/* The (token, slot) pairs of each expert: pairs[start[e] .. start[e + 1]) = token * k + slot, in rising order. */
typedef struct expert_groups {
    int32_t *start; /* [n_expert + 1] */
    int32_t *pairs; /* [n * k] */
    float *hidden;  /* [n * k][d_expert] by place in `pairs` */
    float *out;     /* [n * k][d_model] by pair */
    int32_t *list;  /* [n_expert] those that next_experts gave */
    int32_t n_expert;
    bool given;     /* without a feed: all were */
    char *rest;     /* of the work: what is left for whoever groups */
} expert_groups;

/* Places the groups in the work memory of the operation `experts`, and fills start and pairs. */
expert_groups group_by_expert(void *work, const int32_t *experts, int64_t n, int64_t k, int64_t d_model,
                              int64_t d_expert, int64_t n_expert);

/* Writes the experts to compute now to g->list, and returns their number; 0: all are done. */
int32_t next_experts(const expert_feed *feed, expert_groups *g);

/* y[i][d] = sum over slots, in order, of weights[i][s] * out[i * k + s][d] */
void combine_experts(const ops *o, float *y, const float *out, const float *weights, int64_t n, int64_t k, int64_t d);

#endif
