// Runs one kernel without torch: `kernels_alone FILE`. FILE holds the problem and the tensors
// as written by test_kernels.py; the results are appended to it. Compiled with AddressSanitizer, and
// with DCNV3_TEST_CUDA beside imitation/cuda_kernels.cpp.
#include <stdio.h>
#include <stdlib.h>

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
  const bool deterministic = h[22];

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
#ifdef DCNV3_TEST_CUDA
  std::vector<char> sums(in * (bytes == 8 ? 8 : 4));
  p.grad_input = sums.data();
  const char* error = dcnv3::cuda_forward(p, nullptr);
  if (!error) error = dcnv3::cuda_backward(p, deterministic, nullptr);
  if (error) return fprintf(stderr, "%s\n", error), 4;
  fwrite(p.output, bytes, out, file);
  fwrite(sums.data(), 1, sums.size(), file);
#else
  (void)deterministic;
  dcnv3::cpu_forward(p, 0, dcnv3::cpu_forward_tasks(p));
  dcnv3::cpu_backward(p, 0, dcnv3::cpu_backward_tasks(p));
  fwrite(p.output, bytes, out, file);
  fwrite(p.grad_input, bytes, in, file);
#endif
  fwrite(p.grad_offset, bytes, out_pixels * p.group * points * 2, file);
  fwrite(p.grad_mask, bytes, out_pixels * p.group * points, file);
  fclose(file);
  return 0;
}
