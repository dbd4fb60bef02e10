/* Every weight format to kernels: the block structs and decoders of quants/, by type. */
#ifndef DG_CUDA_BLOCKS_H
#define DG_CUDA_BLOCKS_H

#include "bf16.h"
#include "f16.h"
#include "f32.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"

/* struct of_q4_k { block; VALUES; decode(block, values) } and so on */
#define DG_FORMAT(NAME, id, stem, count, encodes)                                                  \
    struct of_##stem {                                                                             \
        using block = block_##stem;                                                                \
        static constexpr int VALUES = count;                                                       \
        __device__ static void decode(const block *b, float *values) { stem##_decode(b, values); } \
    };
#include "formats.def"
#undef DG_FORMAT

/* Calls f(of_...()) for the format. */
template <class F> static inline void for_format(int32_t format, F f) {
    switch (format) {
#define DG_FORMAT(NAME, id, stem, count, encodes) \
    case id: f(of_##stem()); break;
#include "formats.def"
#undef DG_FORMAT
    default: break;
    }
}

#endif
