// The backward pass on a GPU; cuda_common.h says how the work is cut, and has its first step. The others:
//
// 2. The gradient of the input: every pair adds to its corners in memory, in float32. What that costs is
//    the 32-byte sectors of memory each instruction touches, so the threads of a pair always add to whole
//    ones. In the deterministic variant a kernel of its own does this step, in which one thread owns a
//    channel of an image and takes its points in order.
// 3. Of every point, the output gradient's dot products with the four corners.
// 4. One thread a pair again: the gradients of mask and offset follow from the dot products.
// 5. They are written, neighbouring threads to neighbouring numbers.
#include "cuda_common.h"

namespace dcnv3 {
namespace {

struct Backward {
  Problem problem;  // grad_input: the sums, of type Accumulator<T>
  Cut cut;
  bool scatter;  // step 2 is done here
};

// Numbers that one instruction adds to memory: since sm_90 four float32.
#if defined(DCNV3_TEST_ATOMIC_VECTOR)
constexpr int kAtomicVector = DCNV3_TEST_ATOMIC_VECTOR;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
constexpr int kAtomicVector = 4;
#else
constexpr int kAtomicVector = 1;
#endif
constexpr int kSectorNumbers = 8;

template <int size, typename A>
__device__ inline void add_to(A* to, const A* numbers) {
  if constexpr (size == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(numbers[0], numbers[1], numbers[2], numbers[3]));
  } else {
    static_assert(size == 1, "GPUs add one number or four");
    atomicAdd(to, numbers[0]);
  }
}

// Step 2. A thread adds `rounds` vectors of a pair's channels to each corner, a sector's worth apart.
template <typename T, int kPoints, int rounds, typename Index>
__device__ inline void scatter(const Problem& p, const Cut& cut, const Shared<Accumulator<T>, kPoints, Index>& shared) {
  using A = Accumulator<T>;
  constexpr int vector = kPoints && sizeof(A) == sizeof(float) ? kAtomicVector : 1;
  constexpr int lanes = kSectorNumbers / vector;
  const CornerPointers<A> grad_input(static_cast<A*>(p.grad_input), Distances<Index>(p));
  for (int item = threadIdx.x; item < cut.pairs * lanes; item += kThreads) {
    const int i = item / lanes, lane = item % lanes;
    const Pair<Index> pair = pair_of<Index>(cut, blockIdx.x, i);
    if (!pair.valid) continue;
    const Index from = first_channel(p, pair);
    for (int c = lane * vector; c < int(p.channels); c += rounds * kSectorNumbers) {
      A grad[rounds][vector];
#pragma unroll
      for (int r = 0; r < rounds; ++r)
        widen(load<vector>(static_cast<const T*>(p.grad_output) + (from + Index(c + r * kSectorNumbers))), grad[r]);
#pragma unroll
      for (int k = 0; k < shared.points; ++k) {
        const Corners<A> corners = shared.corners[shared.at(k, i)];
        const A* const weight = corners.weight;
        // A point outside adds nothing.
        if (weight[0] == A(0) && weight[1] == A(0) && weight[2] == A(0) && weight[3] == A(0)) continue;
        const Index place = shared.places[shared.at(k, i)] + Index(c);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          A* const to = grad_input.to[q] + place;
#pragma unroll
          for (int r = 0; r < rounds; ++r) {
            A part[vector];
#pragma unroll
            for (int j = 0; j < vector; ++j) part[j] = grad[r][j] * weight[q];
            add_to<vector>(to + r * kSectorNumbers, part);
          }
        }
      }
    }
  }
}

// Step 3. The dot products take the place of the weights. kLanes = 0: any number of threads a pair.
template <typename T, int kPoints, int size, int kLanes, typename Index>
__device__ inline void multiply(const Problem& p, const Cut& cut,
                                const Shared<Accumulator<T>, kPoints, Index>& shared) {
  using A = Accumulator<T>;
  const int lanes = kLanes ? kLanes : cut.lanes();
  const CornerPointers<const T> input(static_cast<const T*>(p.input), Distances<Index>(p));
  // Whole warps take part to the end, because the threads of a pair lie in one and add up by shuffles.
  for (int item = threadIdx.x; item < (cut.pairs * lanes + 31) / 32 * 32; item += kThreads) {
    const int i = item / lanes < cut.pairs ? item / lanes : 0, lane = item % lanes;
    const Pair<Index> pair = pair_of<Index>(cut, blockIdx.x, i);
    const T* const grad_output = static_cast<const T*>(p.grad_output) + first_channel(p, pair);
    A grad[size] = {};
    if (kPoints && pair.valid) widen(load<size>(grad_output + lane * size), grad);  // one vector a thread
#pragma unroll
    for (int k = 0; k < shared.points; ++k) {
      A dot[4] = {};
      const Index place = shared.places[shared.at(k, i)];
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

// Step 4. The gradients of x, y and mask take the place of the dot products.
template <typename T, int kPoints, typename Index>
__device__ inline void combine(const Problem& p, const Cut& cut, const Shared<Accumulator<T>, kPoints, Index>& shared) {
  using A = Accumulator<T>;
  for (int i = threadIdx.x; i < cut.pairs; i += kThreads) {
    const Pair<Index> pair = pair_of<Index>(cut, blockIdx.x, i);
    if (!pair.valid) continue;
    const Points<T, kPoints, Index> at(p, cut, pair);
    A mean = 0;
#pragma unroll
    for (int k = 0; k < shared.points; ++k) {
      Axis<A> h, v;
      at.axes(k, &h, &v);
      const Corners<A> dot = shared.corners[shared.at(k, i)];
      const A mask = shared.masks[shared.at(k, i)], by_offset = mask * A(p.offset_scale);
      const A low = h.low_weight * dot.weight[0] + h.high_weight * dot.weight[1];
      const A high = h.low_weight * dot.weight[2] + h.high_weight * dot.weight[3];
      const A low_x = h.low_slope * dot.weight[0] + h.high_slope * dot.weight[1];
      const A high_x = h.low_slope * dot.weight[2] + h.high_slope * dot.weight[3];
      const A by_mask = v.low_weight * low + v.high_weight * high;
      mean += mask * by_mask;
      shared.corners[shared.at(k, i)] = {{(v.low_weight * low_x + v.high_weight * high_x) * by_offset,
                                         (v.low_slope * low + v.high_slope * high) * by_offset, by_mask, A(0)}};
    }
    if (!p.softmax) continue;
#pragma unroll
    for (int k = 0; k < shared.points; ++k) {
      A* const by_mask = &shared.corners[shared.at(k, i)].weight[2];
      *by_mask = shared.masks[shared.at(k, i)] * (*by_mask - mean);
    }
  }
}

// Step 5.
template <typename T, int kPoints, typename Index>
__device__ inline void write(const Problem& p, const Cut& cut, const Shared<Accumulator<T>, kPoints, Index>& shared) {
  using A = Accumulator<T>;
  for (int item = threadIdx.x; item < cut.pairs * shared.points; item += kThreads) {
    const int i = item / shared.points, k = item % shared.points;
    const Pair<Index> pair = pair_of<Index>(cut, blockIdx.x, i);
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

template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) backward_kernel(Backward a) {
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  DCNV3_SHARED(memory);
  const Shared<Accumulator<T>, kPoints, Index> shared(memory, cut);
  locate<T, kPoints, Index>(p, cut, blockIdx.x, true, shared);
  __syncthreads();
  if (a.scatter) {
    if (kPoints && p.channels % (2 * kSectorNumbers) == 0)
      scatter<T, kPoints, 2, Index>(p, cut, shared);
    else
      scatter<T, kPoints, 1, Index>(p, cut, shared);
  }
  __syncthreads();
  constexpr int usual = kPoints ? 16 / size : 0;  // groups of InternImage T to XL have 16 channels
  if (usual && cut.lanes() == usual)
    multiply<T, kPoints, size, usual, Index>(p, cut, shared);
  else
    multiply<T, kPoints, size, 0, Index>(p, cut, shared);
  __syncthreads();
  combine<T, kPoints, Index>(p, cut, shared);
  __syncthreads();
  write<T, kPoints, Index>(p, cut, shared);
}

// The gradient of the input alone, in a fixed order of sums: a block takes one group of one image, a
// thread owns channels, and goes through all output pixels in order. Slow, for deterministic mode.
template <typename T>
__global__ void __launch_bounds__(kThreads) ordered_kernel(Backward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;  // one group a block
  DCNV3_SHARED(memory);
  const Shared<A, 0, int64_t> shared(memory, cut);
  const Distances<int64_t> far(p);
  const int64_t image = blockIdx.x / p.group, group = blockIdx.x % p.group;
  const int64_t begin = image * p.out_height * p.out_width, end = begin + p.out_height * p.out_width;
  // Tiles do not begin with an image: the pixels of its neighbours are passed over.
  for (int64_t tile = begin / cut.pairs; tile * cut.pairs < end; ++tile) {
    locate<T, 0, int64_t>(p, cut, uint32_t(tile * p.group + group), false, shared);
    __syncthreads();
    for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
      for (int i = 0; i < cut.pairs; ++i) {
        const int64_t pixel = tile * cut.pairs + i;
        if (pixel < begin || pixel >= end) continue;
        const A grad = widen(static_cast<const T*>(p.grad_output)[(pixel * p.group + group) * p.channels + c]);
        for (int k = 0; k < cut.points; ++k) {
          const Corners<A> corners = shared.corners[shared.at(k, i)];
          A* const to = static_cast<A*>(p.grad_input) + shared.places[shared.at(k, i)] + c;
          A sum[4];
          for (int q = 0; q < 4; ++q) sum[q] = to[far.corner[q]] + grad * corners.weight[q];
          // Corners with a weight are four places; one without may be another's, and must not undo its sum.
          for (int q = 0; q < 4; ++q)
            if (corners.weight[q] != A(0)) to[far.corner[q]] = sum[q];
        }
      }
    }
    __syncthreads();
  }
}

template <typename T>
const char* backward(const Problem& whole, bool deterministic, void* stream) {
  using A = Accumulator<T>;
  constexpr int vector = kVectorBytes / sizeof(T);
  return in_parts(whole, sizeof(T), sizeof(A), [&](const Problem& p, bool reached) {
    const void* tensors[] = {p.input, p.grad_output, p.grad_input};
    constexpr int point_bytes = Shared<A, 0, int64_t>::bytes(true);
    const char* error;
    if (reached && fits_vectors(p, vector, sizeof(T), tensors, 3)) {
      constexpr int small_point_bytes = Shared<A, 9, uint32_t>::bytes(true);
      const Backward a{p, cut_of(p, vector, small_point_bytes), !deterministic};
      error = launch(backward_kernel<T, 9, vector, uint32_t>, a, a.cut.blocks, 9 * kPairs * small_point_bytes, stream);
    } else {
      const Backward a{p, cut_of(p, 1, point_bytes), !deterministic};
      if (a.cut.blocks == 0) return kTooManyPoints;
      const int64_t bytes = int64_t(a.cut.points) * a.cut.pairs * point_bytes;
      error = launch(backward_kernel<T, 0, 1, int64_t>, a, a.cut.blocks, bytes, stream);
    }
    if (error || !deterministic) return error;
    const Backward a{p, cut_of(p, 1, point_bytes, 1), true};
    return launch(ordered_kernel<T>, a, p.batch * p.group, int64_t(a.cut.points) * a.cut.pairs * point_bytes, stream);
  });
}

}  // namespace

const char* cuda_backward(const Problem& p, bool deterministic, void* stream) {
  switch (p.dtype) {
    case Dtype::float64: return backward<double>(p, deterministic, stream);
    case Dtype::float32: return backward<float>(p, deterministic, stream);
    case Dtype::float16: return backward<Float16>(p, deterministic, stream);
    case Dtype::bfloat16: return backward<BFloat16>(p, deterministic, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
