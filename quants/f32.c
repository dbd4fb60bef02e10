#include "encode.h"
#include "f32.h"

void f32_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    (void)importance;
    block_f32 *b = blocks;
    for (int64_t i = 0; i < n_blocks; i++) b[i].v = values[i];
}
