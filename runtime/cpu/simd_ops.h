/* The operations that are compiled once per instruction set, ISA: matmul_avx2, matmul_avx512, ... */
#ifndef DG_SIMD_OPS_H
#define DG_SIMD_OPS_H

#include "cpu.h"

#define SIMD_JOIN(name, set) name##_##set
#define SIMD_NAME(name, set) SIMD_JOIN(name, set)
#define SIMD(name) SIMD_NAME(name, ISA)

#define DG_OP(name, arguments, names) void SIMD(name) arguments;
#define DG_HOST_OP(name, arguments, names)
#include "ops.def"
#undef DG_OP

static inline float *scratch_of(const ops *o, int32_t thread) { return o->scratch + thread * o->scratch_floats; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
