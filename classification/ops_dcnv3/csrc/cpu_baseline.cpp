// The CPU kernels for any processor of the family.
#define DCNV3_ISA baseline
#define DCNV3_VECTOR_BYTES 16
#include "cpu_target.inc"
