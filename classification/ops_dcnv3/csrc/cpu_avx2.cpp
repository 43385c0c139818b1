// The CPU kernels for AVX2.
#define DCNV3_ISA avx2
#define DCNV3_VECTOR_BYTES 32
#define DCNV3_TARGET "avx2,fma"
#include "cpu_target.inc"
