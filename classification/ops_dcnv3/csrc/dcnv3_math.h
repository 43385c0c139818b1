// The arithmetic of DCNv3, shared by the CPU and the CUDA kernels: where a point samples, with what
// weights, and how those move with its position. The CPU tests thereby exercise what a GPU computes.
//
// All functions are branch-free, so that a loop over points vectorises on a CPU and does not diverge
// on a GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define DCNV3_INLINE __host__ __device__ __forceinline__
#else
#define DCNV3_INLINE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define DCNV3_DEVICE  // what a GPU does with instructions of its own
#include "cuda_instructions.h"
#elif defined(DCNV3_EMULATED)
#define DCNV3_DEVICE  // the tests compile these branches for a CPU
#endif

namespace dcnv3 {
namespace {  // a copy per object file: objects are compiled for different instruction sets

// ---- numbers ----------------------------------------------------------------------------------

// 16-bit floats, as bits: the same for host and device, whatever the compiler has for them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
DCNV3_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

DCNV3_INLINE float widen(float x) { return x; }
DCNV3_INLINE double widen(double x) { return x; }
DCNV3_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
DCNV3_INLINE float widen(Float16 x) {
#if defined(DCNV3_DEVICE)
  return float_of_half_bits(x.bits);
#else
  // Exponent and fraction move to their places in a float32; the product mends the exponent's bias,
  // and makes subnormal numbers normal on the way.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity or NaN
  const float scaled = bits_as<float>(magnitude) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(scaled) | special | uint32_t(x.bits & 0x8000) << 16);
#endif
}

// Rounding is to nearest, ties to even.
DCNV3_INLINE void narrow(float x, float* to) { *to = x; }
DCNV3_INLINE void narrow(double x, double* to) { *to = x; }
DCNV3_INLINE void narrow(float x, BFloat16* to) {
#if defined(DCNV3_DEVICE) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
  to->bits = bfloat_bits_of(x);
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x != x ? 0x7fc0 : rounded);
#endif
}
DCNV3_INLINE void narrow(float x, Float16* to) {
#if defined(DCNV3_DEVICE)
  to->bits = half_bits_of(x);
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal results: round away 13 bits, then mend the bias. Subnormal ones: an addition that puts
  // the last bit of a half at the last bit of a float rounds them by itself.
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00 : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? 0x7e00 : half;   // NaN
  to->bits = uint16_t(half | (bits >> 16 & 0x8000));
#endif
}

template <typename T>
using Accumulator = decltype(widen(T{}));  // float32, or float64 for float64

// e^x for the softmax, x <= 0.
DCNV3_INLINE float exp_of(float x) {
#if defined(DCNV3_DEVICE)
  return expf(x);
#else
  // e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor polynomial of degree 7,
  // whose error is below that of float32. Below -87 the result would be subnormal: clamped, so that
  // 2^n stays a normal number. NaN passes through.
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
#endif
}
DCNV3_INLINE double exp_of(double x) { return exp(x); }

// The same where a result of 16 bits is enough. A GPU's own instruction has an error of 2^-22 of e^x,
// and more with -x, but e^x falls faster.
template <typename A>
DCNV3_INLINE A rough_exp_of(A x) {
#if defined(DCNV3_DEVICE)
  static_assert(sizeof(A) == sizeof(float), "sums of 16-bit numbers are float32");
  return rough_power_of_two(x * 1.44269504f);
#else
  return exp_of(x);
#endif
}

// ---- points -----------------------------------------------------------------------------------

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

// a b + c, rounded once on a GPU: there two kernels' steps compute a position each, and must get the same.
template <typename A>
DCNV3_INLINE A multiply_add(A a, A b, A c) {
#if defined(DCNV3_DEVICE)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Position, along one axis, of kernel element 0 at output `step` with a zero offset. offset_scale
// stretches the grid around the middle of the kernel.
template <typename A>
DCNV3_INLINE A origin_of(int64_t step, int kernel, int stride, int padding, int dilation, A offset_scale) {
  const int extent = (dilation * (kernel - 1)) / 2;
  return multiply_add(-A(extent), offset_scale, A(extent - padding + step * stride));
}

// Position, along one axis, of the kernel element `grid` pixels (row or column times dilation) from
// element 0.
template <typename A>
DCNV3_INLINE A position_of(A origin, A grid, A offset, A offset_scale) {
  return multiply_add(grid + offset, offset_scale, origin);
}

// The larger and the smaller of two numbers; b where a is NaN.
#if defined(DCNV3_DEVICE)
DCNV3_INLINE float larger_of(float a, float b) { return fmaxf(a, b); }
DCNV3_INLINE float smaller_of(float a, float b) { return fminf(a, b); }
#endif
template <typename A>
DCNV3_INLINE A larger_of(A a, A b) {
  return a > b ? a : b;
}
template <typename A>
constexpr DCNV3_INLINE A smaller_of(A a, A b) {
  return a < b ? a : b;
}
DCNV3_INLINE float magnitude_of(float x) { return fabsf(x); }
DCNV3_INLINE double magnitude_of(double x) { return fabs(x); }

template <typename A>
DCNV3_INLINE int floor_of(A x) {
#if defined(DCNV3_DEVICE)
  return integer_below(x);
#else
  const int truncated = int(x);
  return truncated - (A(truncated) > x ? 1 : 0);
#endif
}

// How far the second pixel of a sample lies from the first, along an axis of `size` pixels.
DCNV3_INLINE int next_pixel(int size) { return smaller_of(size - 1, 1); }

// One axis of a bilinear sample: two neighbouring pixels, their weights, and the weights' derivatives.
template <typename A>
struct Axis {
  int low, high;              // indices that exist; high = low + next
  A low_weight, high_weight;  // 0 for a pixel that the sample does not touch
  A low_slope, high_slope;    // d weight / d position: -1, 0 or 1
};

// `position` along an axis of `size` pixels, with next = next_pixel(size). Beyond the first and the last
// pixel, where one neighbour does not exist, the two pixels are the outermost ones, so that high is
// always next to low: a GPU then reaches the four corners of a sample by four constant distances. At an
// integer the cell, and with it the slopes, are those of floor. A point counts if -1 < position < size
// on both axes; otherwise, and at NaN, all four numbers of the axis are 0, so that the sample and all its
// gradients are, whatever the other axis says.
//
// No condition depends on another and none on `size` alone: compilers would make branches of them, and
// not vectorise the loops around.
template <typename A>
DCNV3_INLINE Axis<A> axis_of(A position, int size, int next) {
  const A x = smaller_of(larger_of(position, A(-1)), A(size));  // -1 for NaN
  const int cell = floor_of(x);
  Axis<A> axis;
  axis.low = smaller_of(larger_of(cell, 0), larger_of(size - 2, 0));
  axis.high = axis.low + next;
  const A from_low = x - A(axis.low), low = A(1) - magnitude_of(from_low);
  const A high = A(1) - magnitude_of(from_low - A(1));
  axis.low_weight = larger_of(low, A(0));
  axis.high_weight = larger_of(high, A(0)) * A(next);
  // By how far the cell was moved inside, 1, 0 or -1, low has the slope 1, -1 or 0, high 0, 1 or -1.
  const A counts = (x > A(-1) ? A(1) : A(0)) * (x < A(size) ? A(1) : A(0));
  const A moved = (A(axis.low) - A(cell)) * counts;
  const A even = A(1.5) * moved * moved - counts, odd = A(0.5) * moved;
  axis.low_slope = odd + even;
  axis.high_slope = (odd - even) * A(next);
  return axis;
}

}  // namespace
}  // namespace dcnv3
