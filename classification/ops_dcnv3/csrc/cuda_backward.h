// The backward pass on a GPU: what its kernels share; cuda_common.h says how the work is cut. After the
// first step, which locates the points:
//
// 2. The gradient of the input: every pair adds to its corners. In this the kernels differ:
//    - atomic (cuda_backward.cu) adds to memory, from all blocks at once and in no fixed order;
//    - tiled (cuda_tiled.cu): a block takes a tile of output pixels, sums up what they give to each pixel near
//      the tile, and adds that to memory once;
//    - owning (cuda_owning.cu): a block owns an image's group, and adds in shared memory, where that fits;
//    - of 16-bit numbers and 16 or 32 channels, tiled and owning do steps 2 and 3 by matrix products (cuda_dense.cu);
//    - ordered (cuda_backward.cu) is atomic without this step, and a second kernel, in which one thread
//      owns a channel of an image and takes its points in order. Slow, for determinism where nothing else fits.
// 3. Of every point, the output gradient's dot products with the four corners.
// 4. One thread a pair again: the gradients of mask and offset follow from the dot products.
// 5. They are written, neighbouring threads to neighbouring numbers.
//
// In all of them a corner of weight 0 gets nothing: not even the NaN of an infinite gradient times 0.
#pragma once

#include "cuda_common.h"

namespace dcnv3 {
// Starts the owning kernel, and says whether it fits and whether it pays. cuda_owning.cu.
bool owning_fits(const Problem& problem);
bool owning_pays(const Problem& problem);
const char* owning_backward(const Problem& problem, void* stream);

// Starts the tiled kernel, and says whether it fits and whether it pays. cuda_tiled.cu.
bool tiled_fits(const Problem& problem);
bool tiled_pays(const Problem& problem);
const char* tiled_backward(const Problem& problem, void* stream);

// What the choice between them depends on. Both pay in their shape: enough blocks, whose threads all work.
struct Shape {
  bool owning_fits, owning_pays, tiled_pays, owning_is_dense;
};
BackwardKernel suited_kernel(const Shape& shape, bool deterministic);  // cuda_backward.cu

// Starts the kernel of dense products that stands for the owning or the tiled one, and says whether it fits a problem
// for which version for 3x3 points of that one does. cuda_dense.cu.
bool dense_fits(const Problem& problem, bool owns);
const char* dense_backward(const Problem& problem, bool owns, void* stream);

namespace {

// What the choice of a kernel depends on, of the current device.
struct Device {
  int major, shared_bytes;  // compute capability; of a multiprocessor
};
inline Device device() {
  int number = 0;
  Device device{};
  cudaGetDevice(&number);
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, number);
  cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, number);
  return device;
}

// The cut of the output into tiles of one group, and the input pixels around one, its window.
constexpr int kTile = 8, kWindow = 16;  // pixels of a side
static_assert(kTile * kTile == kPairs, "a tile is what a block's points have room for");

// block = ((image * down + tile row) * across + tile column) * groups + group: blocks that run together share
// lines of memory.
struct Tiling {
  Divisor groups, across, down;
  int64_t blocks;
  explicit Tiling(const Problem& p)
      : groups(p.group), across((p.out_width + kTile - 1) / kTile), down((p.out_height + kTile - 1) / kTile),
        blocks(p.batch * p.group * across.value * down.value) {}
};

// The output pixels of a block, in place of a Span.
template <typename Index>
struct Tile {
  Index image, group;
  int row, column;
};
template <typename Index>
__device__ inline Tile<Index> tile_of(const Tiling& a, uint32_t block) {
  const uint32_t tile = a.groups.quotient(block), row = a.across.quotient(tile), image = a.down.quotient(row);
  return {Index(image), Index(block - tile * a.groups.value), int(row - image * a.down.value) * kTile,
          int(tile - row * a.across.value) * kTile};
}
template <typename Index>
__device__ inline Pair<Index> pair_of(const Cut& cut, const Tile<Index>& tile, uint32_t i) {
  const uint32_t row = tile.row + i / kTile, column = tile.column + i % kTile;
  Pair<Index> pair;
  pair.pixel = (tile.image * Index(cut.height.value) + Index(row)) * Index(cut.width.value) + Index(column);
  pair.group = tile.group;
  pair.valid = row < cut.height.value && column < cut.width.value;
  return pair;
}

// Along one axis, the first input pixel of the window. Its middle is where that of the tile samples.
__device__ inline int window_of(int first, int kernel, int stride, int padding, int dilation) {
  return (first + kTile / 2) * stride - padding + dilation * (kernel - 1) / 2 - kWindow / 2;
}

// Numbers that one instruction adds to memory: since sm_90 four float32.
#if defined(DCNV3_TEST_ATOMIC_VECTOR)
constexpr int kAtomicVector = DCNV3_TEST_ATOMIC_VECTOR;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
constexpr int kAtomicVector = 4;
#else
constexpr int kAtomicVector = 1;
#endif
constexpr int kSectorNumbers = 8;
template <typename A, int kPoints>
constexpr int vector_of = kPoints && sizeof(A) == sizeof(float) ? kAtomicVector : 1;

template <int size, typename A>
__device__ inline void add_to(A* to, const A* numbers) {
  if constexpr (size == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(numbers[0], numbers[1], numbers[2], numbers[3]));
  } else {
    static_assert(size == 1, "GPUs add one number or four");
    atomicAdd(to, numbers[0]);
  }
}

// Step 2 by adds to memory, of the points k of pairs i that takes(k, i). What it costs is the 32-byte sectors of
// memory that each instruction touches, so the threads of a pair always add to whole ones. A thread adds
// `rounds` vectors of a pair's channels to each corner, a sector's worth apart.
template <typename T, int rounds, typename Pixels, int kPoints, typename Index, typename Takes>
__device__ inline void scatter_by(const Problem& p, const Cut& cut, const Pixels& span,
                                  const Shared<Accumulator<T>, kPoints, Index, true>& shared, const Takes& takes) {
  using A = Accumulator<T>;
  constexpr int vector = vector_of<A, kPoints>;
  constexpr int lanes = kSectorNumbers / vector;
  const Index all = Index(p.group * p.channels);
  const CornerPointers<A> grad_input(static_cast<A*>(p.grad_input), Distances<Index>(p));
  for (int item = threadIdx.x; item < cut.pairs * lanes; item += kThreads) {
    const int i = item / lanes, lane = item % lanes;
    const Pair<Index> pair = pair_of(cut, span, i);
    if (!pair.valid) continue;
    const Index from = first_channel(p, pair);
    for (int c = lane * vector; c < int(p.channels); c += rounds * kSectorNumbers) {
      const Index channel = pair.group * Index(p.channels) + Index(c);
      A grad[rounds][vector];
#pragma unroll
      for (int r = 0; r < rounds; ++r)
        widen(load<vector>(static_cast<const T*>(p.grad_output) + (from + Index(c + r * kSectorNumbers))), grad[r]);
#pragma unroll
      for (int k = 0; k < shared.points; ++k) {
        if (!takes(k, i)) continue;
        const Corners<A> corners = shared.corners[shared.at(k, i)];
        const Index place = shared.places[shared.at(k, i)].numbers[0] * all + channel;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (corners.weight[q] == A(0)) continue;
          A* const to = grad_input.to[q] + place;
#pragma unroll
          for (int r = 0; r < rounds; ++r) {
            A part[vector];
#pragma unroll
            for (int j = 0; j < vector; ++j) part[j] = grad[r][j] * corners.weight[q];
            add_to<vector>(to + r * kSectorNumbers, part);
          }
        }
      }
    }
  }
}

template <typename T, typename Pixels, int kPoints, typename Index, typename Takes>
__device__ inline void scatter(const Problem& p, const Cut& cut, const Pixels& span,
                               const Shared<Accumulator<T>, kPoints, Index, true>& shared, const Takes& takes) {
  if (kPoints && p.channels % (2 * kSectorNumbers) == 0)
    scatter_by<T, 2>(p, cut, span, shared, takes);
  else
    scatter_by<T, 1>(p, cut, span, shared, takes);
}

// Step 3. The dot products take the place of the weights. kLanes = 0: any number of threads a pair.
template <typename T, int size, int kLanes, typename Pixels, int kPoints, typename Index>
__device__ inline void multiply_by(const Problem& p, const Cut& cut, const Pixels& span,
                                   const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  const int lanes = kLanes ? kLanes : cut.lanes();
  const Index all = Index(p.group * p.channels);
  const CornerPointers<const T> input(static_cast<const T*>(p.input), Distances<Index>(p));
  // Whole warps take part to the end, because the threads of a pair lie in one and add up by shuffles.
  for (int item = threadIdx.x; item < (cut.pairs * lanes + 31) / 32 * 32; item += kThreads) {
    const int i = item / lanes < cut.pairs ? item / lanes : 0, lane = item % lanes;
    const Pair<Index> pair = pair_of(cut, span, i);
    const T* const grad_output = static_cast<const T*>(p.grad_output) + first_channel(p, pair);
    const Index channel = pair.group * Index(p.channels);
    A grad[size] = {};
    if (kPoints && pair.valid) widen(load<size>(grad_output + lane * size), grad);  // one vector a thread
#pragma unroll
    for (int k = 0; k < shared.points; ++k) {
      A dot[4] = {};
      const Index place = shared.places[shared.at(k, i)].numbers[0] * all + channel;
      for (int c = lane * size; kPoints || (c < int(p.channels) && pair.valid); c += lanes * size) {
        if (!kPoints) widen(load<size>(grad_output + c), grad);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          A numbers[size];
          widen(load<size>(input.to[q] + (place + Index(c))), numbers);
#pragma unroll
          for (int j = 0; j < size; ++j) dot[q] += grad[j] * numbers[j];
        }
        if (kPoints) break;
      }
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int q = 0; q < 4; ++q) dot[q] += __shfl_xor_sync(0xffffffffu, dot[q], step);
      }
      if (lane == 0 && item / lanes < cut.pairs) shared.corners[shared.at(k, i)] = {{dot[0], dot[1], dot[2], dot[3]}};
    }
  }
}

template <typename T, int size, typename Pixels, int kPoints, typename Index>
__device__ inline void multiply(const Problem& p, const Cut& cut, const Pixels& span,
                                const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  constexpr int usual = kPoints ? 16 / size : 0;  // groups of InternImage T to XL have 16 channels
  if (usual && cut.lanes() == usual)
    multiply_by<T, size, usual>(p, cut, span, shared);
  else
    multiply_by<T, size, 0>(p, cut, span, shared);
}

// The gradients of x, y and mask of one point, in this order, from the dot products with its corners.
template <typename A>
DCNV3_INLINE Corners<A> gradients_of(const Axis<A>& h, const Axis<A>& v, const A* dot, A by_offset) {
  const A low = h.low_weight * dot[0] + h.high_weight * dot[1], high = h.low_weight * dot[2] + h.high_weight * dot[3];
  const A low_x = h.low_slope * dot[0] + h.high_slope * dot[1], high_x = h.low_slope * dot[2] + h.high_slope * dot[3];
  return {{(v.low_weight * low_x + v.high_weight * high_x) * by_offset,
           (v.low_slope * low + v.high_slope * high) * by_offset, v.low_weight * low + v.high_weight * high, A(0)}};
}

// Step 4. The gradients of x, y and mask take the place of the dot products.
template <typename T, typename Pixels, int kPoints, typename Index>
__device__ inline void combine(const Problem& p, const Cut& cut, const Pixels& span,
                               const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  const Share<kPoints> share(shared.points);
  for (int i = share.first_pair(); i < kPairs; i += share.kItems) {
    Pair<Index> pair = pair_of(cut, span, i);
    const bool valid = i < cut.pairs && pair.valid;
    if (!valid) pair = pair_of(cut, span, 0);
    const Points<T, kPoints, Index> at(p, cut, pair);
    A mean = 0;
#pragma unroll
    for (int s = 0; s < share.steps(); ++s) {
      if (!valid || !share.has(s)) continue;
      Axis<A> h, v;
      at.axes(share, s, &h, &v);
      const int k = shared.at(share.point(s), i);
      const Corners<A> dot = shared.corners[k];
      const A mask = shared.masks[k];
      const Corners<A> gradients = gradients_of(h, v, dot.weight, mask * A(p.offset_scale));
      mean += mask * gradients.weight[2];
      shared.corners[k] = gradients;
    }
    if (!p.softmax) continue;
    mean = share.sum(mean);
#pragma unroll
    for (int s = 0; s < share.steps(); ++s) {
      if (!valid || !share.has(s)) continue;
      const int k = shared.at(share.point(s), i);
      A* const by_mask = &shared.corners[k].weight[2];
      *by_mask = shared.masks[k] * (*by_mask - mean);
    }
  }
}

// Step 5.
template <typename T, typename Pixels, int kPoints, typename Index>
__device__ inline void write(const Problem& p, const Cut& cut, const Pixels& span,
                             const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  for (int item = threadIdx.x; item < cut.pairs * shared.points; item += kThreads) {
    const int i = item / shared.points, k = item % shared.points;
    const Pair<Index> pair = pair_of(cut, span, i);
    if (!pair.valid) continue;
    const Corners<A> gradient = shared.corners[shared.at(k, i)];
    const Index to = (pair.pixel * Index(p.group) + pair.group) * Index(shared.points) + Index(k);
    Pack<T, 2> both;
    narrow(gradient.weight[0], &both.numbers[0]);
    narrow(gradient.weight[1], &both.numbers[1]);
    static_cast<Pack<T, 2>*>(p.grad_offset)[to] = both;
    narrow(gradient.weight[2], static_cast<T*>(p.grad_mask) + to);
  }
}

}  // namespace
}  // namespace dcnv3
