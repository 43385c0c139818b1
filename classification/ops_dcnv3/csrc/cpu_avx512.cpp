// The CPU kernels for AVX-512, as processors from Intel's Skylake-SP and AMD's Zen 4 on have it.
#define DCNV3_ISA avx512
#define DCNV3_VECTOR_BYTES 64
#define DCNV3_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma"
#include "cpu_target.inc"
