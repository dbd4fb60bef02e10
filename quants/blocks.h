/* What every block header shares: host/device marks and the conversions between 16- and 32-bit floats. */
#ifndef DG_BLOCKS_H
#define DG_BLOCKS_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define DG_HD __host__ __device__
#else
#define DG_HD
#endif

#define DG_BLOCK_SIZE(type, bytes) typedef char type##_has_its_file_size[sizeof(type) == (bytes) ? 1 : -1]

DG_HD static inline float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

DG_HD static inline uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* IEEE binary16 -> binary32, exact; subnormals, infinities and NaN included. */
DG_HD static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    /* a half's exponent sits 112 below a float's: scaling by 2^112 also normalises subnormals */
    float value = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
    return bits_to_float(sign | float_to_bits(value));
}

/* binary32 -> binary16, to nearest, ties to even; too large becomes infinity, NaN stays NaN. */
DG_HD static inline uint16_t half_from_float(float f) {
    uint32_t u = float_to_bits(f);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000u);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (u >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    if (u < 0x38800000u) { /* subnormal: adding 0.5 lines the float's last bit up with the half's */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13));
}

DG_HD static inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

/* binary32 -> bfloat16, to nearest, ties to even; NaN stays a quiet NaN. */
DG_HD static inline uint16_t bf16_from_float(float f) {
    uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

#endif
