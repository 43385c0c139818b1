// Runs the kernels without torch: `kernels_alone FILE`. FILE holds the problem and the tensors as written
// by test_kernels.py. The results take their place, and every set of them has a line on the standard output:
// the name of the backward kernel, and of a set that is missing, why. Compiled with AddressSanitizer, and with
// DCNV3_TEST_CUDA beside imitation/cuda_kernels.cpp: then all backward kernels, each with the threads of the
// imitation in order and shuffled.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "dcnv3.h"

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  int64_t h[24];
  double scale;
  if (!file || fread(h, sizeof(h), 1, file) != 1 || fread(&scale, sizeof(scale), 1, file) != 1) return 2;
  dcnv3::Problem p{};
  p.dtype = dcnv3::Dtype(h[0]);
  p.batch = h[1], p.height = h[2], p.width = h[3], p.out_height = h[4], p.out_width = h[5];
  p.group = h[6], p.channels = h[7], p.offset_stride = h[8], p.mask_stride = h[9];
  p.kernel_h = int(h[10]), p.kernel_w = int(h[11]), p.stride_h = int(h[12]), p.stride_w = int(h[13]);
  p.padding_h = int(h[14]), p.padding_w = int(h[15]), p.dilation_h = int(h[16]), p.dilation_w = int(h[17]);
  p.remove_center = h[18], p.softmax = h[19], p.offset_scale = scale;
  const int64_t bytes = h[20], shift = h[21];  // of an element; elements by which tensors are off a 16-byte border

  // Every tensor in memory of its own, so that a step beyond it is seen.
  const int64_t points = int64_t(p.kernel_h) * p.kernel_w - p.remove_center;
  const int64_t in = p.batch * p.height * p.width * p.group * p.channels;
  const int64_t out_pixels = p.batch * p.out_height * p.out_width, out = out_pixels * p.group * p.channels;
  std::vector<std::vector<char>> memory;
  auto tensor = [&](int64_t elements, bool read) -> void* {
    const int64_t off = read ? shift * bytes : 0;  // results are always torch's own
    memory.emplace_back(elements * bytes + off);
    char* begin = memory.back().data() + off;
    if (read && fread(begin, bytes, elements, file) != size_t(elements)) exit(3);
    return begin;
  };
  memory.reserve(16);
  p.input = tensor(in, true);
  p.offset = tensor(out_pixels * p.offset_stride, true);
  p.mask = tensor(out_pixels * p.mask_stride, true);
  p.grad_output = tensor(out, true);
  fclose(file);
  p.output = tensor(out, false);
  p.grad_input = tensor(in, false);
  p.grad_offset = tensor(out_pixels * p.group * points * 2, false);
  p.grad_mask = tensor(out_pixels * p.group * points, false);

  file = fopen(arguments[1], "wb");
  const auto write = [&](const void* grad_input, int64_t grad_input_bytes) {
    fwrite(p.output, bytes, out, file);
    fwrite(grad_input, 1, grad_input_bytes, file);
    fwrite(p.grad_offset, bytes, out_pixels * p.group * points * 2, file);
    fwrite(p.grad_mask, bytes, out_pixels * p.group * points, file);
  };
#ifdef DCNV3_TEST_CUDA
  for (const char* seed : {"", "1"}) {
    *seed ? setenv("DCNV3_TEST_SHUFFLE", seed, 1) : unsetenv("DCNV3_TEST_SHUFFLE");
    for (const char* name : {"atomic", "tiled", "owning", "ordered"}) {
      dcnv3::BackwardKernel kernel{};
      const char* error = dcnv3::cuda_backward_kernel(p, name, false, &kernel);
      const bool owning = kernel == dcnv3::BackwardKernel::owning;
      // Sums begin as zeros; what the owning kernel does not write shows as NaN.
      std::vector<char> grad_input(in * (owning || bytes == 8 ? bytes : 4), owning ? 0xff : 0);
      p.grad_input = grad_input.data();
      for (int result : {4, 6, 7}) memset(memory[result].data(), 0xff, memory[result].size());
      if (!error) error = dcnv3::cuda_forward(p, nullptr);
      if (!error) error = dcnv3::cuda_backward(p, kernel, nullptr);
      printf("%s|%s\n", name, error ? error : "");
      if (!error) write(grad_input.data(), grad_input.size());
    }
  }
#else
  for (const char* name : {"AVX-512", "AVX2", "baseline"}) {
    const dcnv3::CpuKernels* kernels = dcnv3::cpu_kernels(name);
    if (!kernels) continue;  // not on this processor
    for (int result : {4, 5, 6, 7}) memset(memory[result].data(), 0xff, memory[result].size());
    kernels->forward(p, 0, dcnv3::cpu_forward_tasks(p));
    kernels->backward(p, 0, dcnv3::cpu_backward_tasks(p));
    printf("%s|\n", kernels->name);
    write(p.grad_input, in * bytes);
  }
#endif
  fclose(file);
  return 0;
}
