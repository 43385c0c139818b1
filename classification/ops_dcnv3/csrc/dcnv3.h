// One call of the operator as plain data: what the torch binding hands to the kernels. No torch here.
#pragma once

#include <stdint.h>

namespace dcnv3 {

enum class Dtype { float64, float32, float16, bfloat16 };

// Tensors are dense, channels last, but for the distance between output pixels of offset and mask,
// which may be views of a wider tensor. Strides count elements.
struct Problem {
  Dtype dtype;
  int64_t batch, height, width, out_height, out_width;
  int64_t group, channels;  // channels of one group
  int64_t offset_stride, mask_stride;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  double offset_scale;
  bool remove_center;
  bool softmax;  // mask holds logits: the softmax over the points of a group comes first

  const void* input;   // [batch, height, width, group, channels]
  const void* offset;  // [batch, out_height, out_width, (group, point, (x, y))], by offset_stride
  const void* mask;    // [batch, out_height, out_width, (group, point)], by mask_stride

  void* output;             // [batch, out_height, out_width, group, channels]; forward only
  const void* grad_output;  // as output; backward only, like all that follows
  void* grad_input;
  void* grad_offset;  // dense
  void* grad_mask;    // dense; the gradient of the logits with `softmax`
};

// CPU. The caller splits the range of tasks over threads; tasks write to disjoint memory and each
// sums in a fixed order, so results do not depend on the number of threads.
int64_t cpu_forward_tasks(const Problem& problem);   // output rows of the batch
int64_t cpu_backward_tasks(const Problem& problem);  // groups of the batch
// One source compiled for several instruction sets. The set that suits this processor, or the one of that name: null
// where it does not run here.
struct CpuKernels {
  const char* name;  // AVX-512, AVX2 or baseline
  void (*forward)(const Problem& problem, int64_t begin, int64_t end);
  void (*backward)(const Problem& problem, int64_t begin, int64_t end);
};
const CpuKernels* cpu_kernels(const char* name = nullptr);

// Null where the current GPU can run the CUDA kernels, otherwise why it cannot: it may be older than the
// architectures they were built for, or its driver older than the toolkit.
const char* cuda_obstacle();
// CUDA, on the current device and on `stream` (a cudaStream_t), without waiting for the result.
// Return null, or what went wrong.
const char* cuda_forward(const Problem& problem, void* stream);
//
// The kernels of the backward pass (cuda_backward.h). `owning` writes problem.grad_input; for the others it
// takes sums: it is float32 (float64 for float64) whatever the dtype, and must be all zeros. The sums of
// `atomic` and `tiled` are in no fixed order.
enum class BackwardKernel { atomic, tiled, owning, ordered };
// The kernel for this problem, of which grad_input is not used: the one `asked` for by name, or what suits
// its shape where that is empty or null. Returns null, or why the one asked for does not fit.
const char* cuda_backward_kernel(const Problem& problem, const char* asked, bool deterministic, BackwardKernel* kernel);
const char* cuda_backward(const Problem& problem, BackwardKernel kernel, void* stream);

}  // namespace dcnv3
