/* The encoders, one per format that writes: values[n_blocks * block] -> blocks[n_blocks].
 * importance: NULL, or for each value a positive weight of its squared error, around 1; floats and Q8_0 need none. */
#ifndef DG_ENCODE_H
#define DG_ENCODE_H

#include <stdint.h>

#define DG_FORMAT(NAME, id, stem, block, encodes) \
    void stem##_encode(const float *values, void *blocks, int64_t n_blocks, const float *importance);
#include "formats.def"
#undef DG_FORMAT

#endif
