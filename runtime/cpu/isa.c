/* The instruction sets of isa.def: whether this processor has them, and their functions for the table of operations. */
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

typedef enum cpuid_register { EAX, EBX, ECX, EDX } cpuid_register;

static bool feature(unsigned leaf, unsigned subleaf, cpuid_register in, unsigned bit) {
    unsigned r[4];
    return __get_cpuid_count(leaf, subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) && (r[in] >> bit & 1);
}

/* Whether the operating system saves these register files: bits of XCR0. */
static bool saved(unsigned files) {
    if (!feature(1, 0, ECX, 27)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & files) == files;
}

#define YMM saved(0x06)
#define ZMM saved(0xe6)
#define FMA feature(1, 0, ECX, 12)
#define F16C feature(1, 0, ECX, 29)
#define AVX2 feature(7, 0, EBX, 5)
#define AVX512F feature(7, 0, EBX, 16)
#define AVX512DQ feature(7, 0, EBX, 17)
#define AVX512BW feature(7, 0, EBX, 30)
#define AVX512VL feature(7, 0, EBX, 31)
#define AVX512_VNNI feature(7, 0, ECX, 11)
#define AVX_VNNI feature(7, 1, EAX, 4)

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#define DOTPROD (getauxval(AT_HWCAP) >> 20 & 1) /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
#define DOTPROD true
#else
#define DOTPROD false
#endif
#endif

#define DG_ISA(name, float_code, products, flags, usable) \
    static bool has_##name(void) { return usable; }
#include "isa.def"
#undef DG_ISA

const isa isas[ISAS + 1] = {
#define DG_ISA(id, float_code, products, flags, condition) \
    {                                                      \
        .name = #id,                                       \
        .usable = has_##id,                                \
        .simd = simd_install_##float_code,                 \
        .gemm = gemm_install_##id,                         \
    },
#include "isa.def"
#undef DG_ISA
    {.name = NULL},
};
