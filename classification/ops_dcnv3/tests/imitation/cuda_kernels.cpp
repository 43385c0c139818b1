// The CUDA kernels over the imitation of CUDA.
#include "cuda_on_cpu.h"
// After the imitation:
#include "cuda_backward.cu"
#include "cuda_dense.cu"
#include "cuda_forward.cu"
#include "cuda_owning.cu"
#include "cuda_tiled.cu"
