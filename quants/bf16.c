#include "encode.h"
#include "bf16.h"

void bf16_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance) {
    (void)importance;
    block_bf16 *b = blocks;
    for (int64_t i = 0; i < n_blocks; i++) b[i].v = bf16_from_float(values[i]);
}
