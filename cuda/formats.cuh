/* Every weight format to kernels: the block structs and decoders of quants/, by type. */
#ifndef DG_CUDA_BLOCKS_H
#define DG_CUDA_BLOCKS_H

#include "every_format.h"

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
