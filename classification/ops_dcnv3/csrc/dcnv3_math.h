// The arithmetic of DCNv3, shared by the CPU and the CUDA kernels: where a point samples, with what
// weights, and how those move with its position. The CPU tests thereby exercise what a GPU computes.
//
// All functions are branch-free, so that a loop over points vectorises on a CPU and does not diverge
// on a GPU.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DCNV3_INLINE __host__ __device__ __forceinline__
#else
#define DCNV3_INLINE inline __attribute__((always_inline))
#endif

namespace dcnv3 {
namespace {  // a copy per object file: objects are compiled for different instruction sets

// Points of a kernel; remove_center leaves the middle one out.
DCNV3_INLINE int point_count(int kernel_h, int kernel_w, bool remove_center) {
  return kernel_h * kernel_w - (remove_center ? 1 : 0);
}

// Row and column of point p in the kernel: columns outside, rows inside.
DCNV3_INLINE void point_of(int p, int kernel_h, int kernel_w, bool remove_center, int* row, int* column) {
  const int center = (kernel_w / 2) * kernel_h + kernel_h / 2;
  const int q = p + (remove_center && p >= center ? 1 : 0);
  *column = q / kernel_h;
  *row = q % kernel_h;
}

// Position, along one axis, of kernel element 0 at output `step` with a zero offset. offset_scale
// stretches the grid around the middle of the kernel.
template <typename A>
DCNV3_INLINE A origin_of(int64_t step, int kernel, int stride, int padding, int dilation, A offset_scale) {
  const int extent = (dilation * (kernel - 1)) / 2;
  return A(extent - padding + step * stride) - A(extent) * offset_scale;
}

// Position, along one axis, of kernel element `element` (row or column).
template <typename A>
DCNV3_INLINE A position_of(A origin, int element, int dilation, A offset, A offset_scale) {
  return origin + (A(element * dilation) + offset) * offset_scale;
}

// One axis of a bilinear sample: the two neighbours, their weights, and the weights' derivatives.
template <typename A>
struct Axis {
  int low, high;              // clamped: always an index that exists
  A low_weight, high_weight;  // 0 where the neighbour lies outside the input
  A low_slope, high_slope;    // d weight / d position: -1 and 1, or 0 outside
};

// `position` along an axis of `size` pixels. At an integer the cell is that of floor. A point counts
// if -1 < position < size on both axes; otherwise, and at NaN, all four numbers of the axis are 0, so
// that the sample and all its gradients are, whatever the other axis says.
template <typename A>
DCNV3_INLINE Axis<A> axis_of(A position, int size) {
  const A above = position > A(-1) ? position : A(-1);  // -1 for NaN as well
  const A x = above < A(size) ? above : A(size);
  const int truncated = int(x);
  const int low = truncated - (A(truncated) > x ? 1 : 0);  // floor
  const A cell = A(low);
  const A fraction = x - cell;
  Axis<A> axis;
  axis.low = low < 0 ? 0 : (low < size ? low : size - 1);
  axis.high = low + 1 < size ? low + 1 : size - 1;
  axis.low_slope = (cell >= A(0)) & (cell < A(size)) ? A(-1) : A(0);
  axis.high_slope = (x > A(-1)) & (cell + A(1) < A(size)) ? A(1) : A(0);
  axis.low_weight = (fraction - A(1)) * axis.low_slope;
  axis.high_weight = fraction * axis.high_slope;
  return axis;
}

}  // namespace
}  // namespace dcnv3
