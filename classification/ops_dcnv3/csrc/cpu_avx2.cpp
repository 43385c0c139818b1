// The CPU kernels for AVX2; cpu_baseline.cpp chooses at run time. The instruction set is named here
// rather than on the command line, so that every source is compiled with the same flags.
#if defined(__x86_64__)
#include <math.h>  // system headers before the instruction set: their inline functions are shared
#include <stdint.h>
#include <string.h>

#include "dcnv3.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "dcnv3_math.h"
#define DCNV3_ISA avx2
#define DCNV3_VECTOR_BYTES 32
#include "cpu_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
