// What the CUDA kernels share: how the work is cut into blocks, and its first half.
//
// A "pair" is one output pixel of one group. A block takes a tile of consecutive pixels times a chunk
// of neighbouring groups (their channels share cache lines), and works in two phases. First, one
// thread a pair: softmax, positions, corners and weights of its points go to shared memory. Then the
// block's threads are dealt out again, each owning up to 16 bytes of the channels of a pair.
//
// Two versions of each kernel: 3x3 with all points unrolled, 16-byte vectors and 32-bit indices, and
// one for any kernel, width, alignment and size.
#pragma once

#ifndef DCNV3_EMULATED  // the tests compile this for the CPU, with an imitation of what follows
#include <cuda_runtime.h>
#define DCNV3_SHARED(name) extern __shared__ double2 name[]
#endif

#include "dcnv3.h"
#include "dcnv3_math.h"

namespace dcnv3 {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 48 * 1024;  // what a block may use without asking
constexpr int kVectorBytes = 16;

// The cut of a problem into blocks.
struct Cut {
  int points;
  int groups_per_block, pixels_per_block, pairs;  // pairs = groups_per_block * pixels_per_block
  int64_t group_chunks, blocks, pixels;           // pixels: output pixels of the batch
};

// `point_bytes`: shared memory for one point. A cut with blocks = 0 means that a pair does not fit.
inline Cut cut_of(const Problem& p, int point_bytes) {
  Cut cut;
  cut.points = point_count(p.kernel_h, p.kernel_w, p.remove_center);
  cut.pixels = p.batch * p.out_height * p.out_width;
  cut.group_chunks = (p.group + 7) / 8;
  cut.groups_per_block = int((p.group + cut.group_chunks - 1) / cut.group_chunks);
  // A pair takes its points and its place in memory (an int64_t).
  const int64_t room = kSharedBytes / (int64_t(cut.points) * point_bytes + int64_t(sizeof(int64_t)));
  if (room < cut.groups_per_block) {
    cut.groups_per_block = room > 0 ? int(room) : 1;
    cut.group_chunks = (p.group + cut.groups_per_block - 1) / cut.groups_per_block;
  }
  const int most = int(room < kThreads ? room : kThreads);
  cut.pixels_per_block = most / cut.groups_per_block;
  cut.pairs = cut.pixels_per_block * cut.groups_per_block;
  const int64_t tiles = cut.pairs > 0 ? (cut.pixels + cut.pixels_per_block - 1) / cut.pixels_per_block : 0;
  cut.blocks = tiles * cut.group_chunks;
  return cut;
}

// Whether the version for 3x3 kernels fits: `vector` elements of `element` bytes at a time.
inline bool fits_vectors(const Problem& p, const Cut& cut, int element, const void* const* tensors, int count) {
  const int vector = kVectorBytes / element;
  const int64_t limit = int64_t(1) << 31, channels = p.group * p.channels;
  bool fits = cut.points == 9 && p.channels % vector == 0 && p.height * p.width * channels < limit &&
              cut.pixels < limit;
  for (int i = 0; i < count; ++i) fits = fits && reinterpret_cast<uintptr_t>(tensors[i]) % kVectorBytes == 0;
  return fits;
}

// Where pair `i` of block `block` lies; beyond the end, `valid` is false.
struct Pair {
  bool valid;
  int64_t pixel, group;
};
__device__ inline Pair pair_of(const Problem& p, const Cut& cut, int64_t block, int i) {
  Pair pair;
  pair.pixel = block / cut.group_chunks * cut.pixels_per_block + i / cut.groups_per_block;
  pair.group = block % cut.group_chunks * cut.groups_per_block + i % cut.groups_per_block;
  pair.valid = pair.pixel < cut.pixels && pair.group < p.group;
  return pair;
}

// A corner's pixel in its image, and whether the neighbours right of and below it differ from it.
DCNV3_INLINE int pack_place(int low_x, int high_x, int low_y, int high_y, int width) {
  return (low_y * width + low_x) << 2 | (high_y - low_y) << 1 | (high_x - low_x);
}

// Calls use(k, mask, horizontal axis, vertical axis) for every point of a valid pair, and returns where
// the pair's channels begin in the input. Index: a type that holds every number of output pixels.
template <typename T, int kPoints, typename Index, typename Use>
__device__ inline int64_t visit_points(const Problem& p, const Cut& cut, const Pair& pair, Use use) {
  using A = Accumulator<T>;
  const int points = kPoints ? kPoints : cut.points;
  const Index pixel = Index(pair.pixel), row_index = pixel / Index(p.out_width);
  const int column = int(pixel % Index(p.out_width)), row = int(row_index % Index(p.out_height));
  const int64_t image = int64_t(row_index / Index(p.out_height));
  const T* offset = static_cast<const T*>(p.offset) + pair.pixel * p.offset_stride + pair.group * points * 2;
  const T* mask = static_cast<const T*>(p.mask) + pair.pixel * p.mask_stride + pair.group * points;
  const A scale = A(p.offset_scale);
  const A x = origin_of<A>(column, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, scale);
  const A y = origin_of<A>(row, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, scale);

  A highest = 0, factor = 1;
  if (p.softmax) {
    A sum = 0;
    highest = widen(mask[0]);
#pragma unroll
    for (int k = 1; k < points; ++k) highest = widen(mask[k]) > highest ? widen(mask[k]) : highest;
#pragma unroll
    for (int k = 0; k < points; ++k) sum += exp_of(widen(mask[k]) - highest);
    factor = A(1) / sum;
  }
#pragma unroll
  for (int k = 0; k < points; ++k) {
    int kernel_row, kernel_column;
    point_of(k, p.kernel_h, p.kernel_w, p.remove_center, &kernel_row, &kernel_column);
    const A at_x = position_of(x, A(kernel_column * p.dilation_w), A(widen(offset[2 * k])), scale);
    const A at_y = position_of(y, A(kernel_row * p.dilation_h), A(widen(offset[2 * k + 1])), scale);
    const A m = p.softmax ? exp_of(widen(mask[k]) - highest) * factor : widen(mask[k]);
    use(k, m, axis_of(at_x, int(p.width)), axis_of(at_y, int(p.height)));
  }
  return image * p.height * p.width * p.group * p.channels + pair.group * p.channels;
}

// `size` numbers that are loaded and stored as one.
template <typename T, int size>
struct alignas(sizeof(T) * size) Pack {
  T numbers[size];
};

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), Arguments arguments, int64_t blocks, int64_t shared, void* stream) {
  if (blocks >= int64_t(1) << 31) return "the problem is too large for one launch: split the batch";
  void* list[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), list, size_t(shared),
                                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: not once more by whoever asks next
  return cudaGetErrorString(error);
}

const char* const kTooManyPoints = "the kernel has too many points for the CUDA kernels (about 900 fit)";
const char* const kTooManyPixels = "images of 2^29 pixels and more do not fit the CUDA kernels";
inline bool too_many_pixels(const Problem& p) { return p.height * p.width >= int64_t(1) << 29; }

}  // namespace
}  // namespace dcnv3
