/* Puts the integer products into a table of operations. */
#include "gemm.h"

void gemm_install(ops *o, const gemm_set *set) {
    o->gemm = set;
    o->float_matmul = o->matmul;
    o->float_experts = o->experts;
    o->float_head = o->head;
    o->float_soften = o->soften;
    o->matmul = gemm_matmul;
    o->experts = gemm_experts;
    o->head = gemm_head;
    o->soften = gemm_soften;
}
