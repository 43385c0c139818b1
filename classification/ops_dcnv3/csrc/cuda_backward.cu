// The backward pass on a GPU; cuda_common.h says how the work is cut.
//
// Of every point, the output gradient's dot products with the four corners give the gradients of
// mask, x and y. The threads of a pair lie in one warp and add their parts there. The gradient of the
// input is added to float32 memory; in the deterministic variant a kernel of its own does that, in
// which one thread owns a channel of an image and takes its points in order.
#include "cuda_common.h"

namespace dcnv3 {
namespace {

struct Backward {
  Problem problem;
  Cut cut;
  void* accumulator;  // null: the gradient of the input is left out
  int lanes;          // threads of a pair: a power of two, at most 32
};

// One point in shared memory: axis weights before, gradients after its sum.
template <typename A>
struct alignas(16) Axes {
  A x_low, x_high, y_low, y_high;
};
template <typename A>
constexpr int kPointBytes = sizeof(Axes<A>) + sizeof(A) + sizeof(int);

// Adds `size` neighbouring numbers to memory: by four float32 where the GPU can.
template <int size, typename A>
__device__ inline void add_to(A* to, const A* numbers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
  if constexpr (size % 4 == 0 && sizeof(A) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < size; i += 4)
      atomicAdd(reinterpret_cast<float4*>(to + i),
                make_float4(numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]));
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < size; ++i) atomicAdd(to + i, numbers[i]);
  }
}

template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads) backward_kernel(Backward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  const int points = kPoints ? kPoints : cut.points;
  DCNV3_SHARED(memory);
  Axes<A>* const axes = reinterpret_cast<Axes<A>*>(memory);                   // [points][pairs]
  int64_t* const bases = reinterpret_cast<int64_t*>(axes + points * cut.pairs);  // [pairs]; -1 beyond the end
  A* const masks = reinterpret_cast<A*>(bases + cut.pairs);                   // [points][pairs]
  int* const places = reinterpret_cast<int*>(masks + points * cut.pairs);     // [points][pairs]

  for (int i = threadIdx.x; i < cut.pairs; i += kThreads) {
    const Pair pair = pair_of(p, cut, blockIdx.x, i);
    bases[i] = -1;
    if (!pair.valid) continue;
    bases[i] = visit_points<T, kPoints, Index>(p, cut, pair, [&](int k, A mask, const Axis<A>& h, const Axis<A>& v) {
      const int to = k * cut.pairs + i;
      axes[to] = {h.low_weight, h.high_weight, v.low_weight, v.high_weight};
      masks[to] = mask;
      places[to] = pack_place(h.low, h.high, v.low, v.high, int(p.width));
    });
  }
  __syncthreads();

  const Index all = Index(p.group * p.channels), line = Index(p.width) * all;
  const int channels = int(p.channels);
  // Whole warps take part to the end, because their threads add up by shuffles.
  for (int item = threadIdx.x; item < (cut.pairs * a.lanes + 31) / 32 * 32; item += kThreads) {
    const int lane = item % a.lanes;
    const bool exists = item / a.lanes < cut.pairs;
    const int i = exists ? item / a.lanes : 0;
    const bool valid = exists && bases[i] >= 0;
    const Pair pair = pair_of(p, cut, blockIdx.x, i);
    const int64_t base = valid ? bases[i] : 0;
    const T* const input = static_cast<const T*>(p.input) + base;
    A* const grad_input = a.accumulator ? static_cast<A*>(a.accumulator) + base : nullptr;
    const T* const grad_output =
        static_cast<const T*>(p.grad_output) + (valid ? (pair.pixel * p.group + pair.group) * p.channels : 0);

    // With unrolled points a thread has just this one vector of channels.
    Pack<T, size> grad = {};
    if (kPoints && valid) grad = *reinterpret_cast<const Pack<T, size>*>(grad_output + lane * size);

#pragma unroll
    for (int k = 0; k < points; ++k) {
      const int at = k * cut.pairs + i;
      const Axes<A> w = valid ? axes[at] : Axes<A>{};
      const A mask = valid ? masks[at] : A(0);
      const int place = valid ? places[at] : 0;
      const Index low = Index(place >> 2) * all;
      const Index right = (place & 1) ? all : Index(0), below = (place & 2) ? line : Index(0);
      const Index corner[4] = {low, low + right, low + below, low + below + right};
      const A weight[4] = {w.y_low * w.x_low, w.y_low * w.x_high, w.y_high * w.x_low, w.y_high * w.x_high};

      A dot[4] = {};
      for (int c = lane * size; c < channels && valid; c += a.lanes * size) {
        if (!kPoints) grad = *reinterpret_cast<const Pack<T, size>*>(grad_output + c);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const Pack<T, size> pack = *reinterpret_cast<const Pack<T, size>*>(input + corner[q] + c);
          A part[size];
#pragma unroll
          for (int j = 0; j < size; ++j) {
            const A g = widen(grad.numbers[j]);
            dot[q] += g * widen(pack.numbers[j]);
            part[j] = g * (weight[q] * mask);
          }
          if (grad_input && weight[q] * mask != A(0)) add_to<size>(grad_input + corner[q] + c, part);
        }
        if (kPoints) break;
      }

      // A slope is not 0 where its neighbour exists. A low one that exists has a weight above 0. A high
      // one differs from the low one, or the low one does not exist, and then has a weight above 0 too.
      const A slope_x_low = w.x_low > A(0) ? A(-1) : A(0), slope_y_low = w.y_low > A(0) ? A(-1) : A(0);
      const A slope_x_high = (place & 1) || w.x_high > A(0) ? A(1) : A(0);
      const A slope_y_high = (place & 2) || w.y_high > A(0) ? A(1) : A(0);
      const A row_low = w.x_low * dot[0] + w.x_high * dot[1], row_high = w.x_low * dot[2] + w.x_high * dot[3];
      A grad_mask = w.y_low * row_low + w.y_high * row_high;
      A grad_x = w.y_low * (slope_x_low * dot[0] + slope_x_high * dot[1]) +
                 w.y_high * (slope_x_low * dot[2] + slope_x_high * dot[3]);
      A grad_y = slope_y_low * row_low + slope_y_high * row_high;
      for (int step = a.lanes / 2; step > 0; step /= 2) {
        grad_mask += __shfl_xor_sync(0xffffffffu, grad_mask, step);
        grad_x += __shfl_xor_sync(0xffffffffu, grad_x, step);
        grad_y += __shfl_xor_sync(0xffffffffu, grad_y, step);
      }
      __syncwarp();  // every thread of the pair has read the point: the gradients take its place
      if (valid && lane == 0) {
        const A by_offset = mask * A(p.offset_scale);
        axes[at] = {grad_x * by_offset, grad_y * by_offset, grad_mask, A(0)};
      }
    }
  }
  __syncthreads();

  // Neighbouring threads write neighbouring numbers.
  const int row = cut.groups_per_block * points;  // points of one pixel in this block
  for (int item = threadIdx.x; item < cut.pixels_per_block * row; item += kThreads) {
    const int i = item / points, k = item % points;  // pairs of a pixel are neighbours
    const Pair pair = pair_of(p, cut, blockIdx.x, i);
    if (!pair.valid) continue;
    const Axes<A> gradient = axes[k * cut.pairs + i];
    A grad_mask = gradient.y_low;
    if (p.softmax) {
      A mean = 0;
#pragma unroll
      for (int j = 0; j < points; ++j) mean += masks[j * cut.pairs + i] * axes[j * cut.pairs + i].y_low;
      grad_mask = masks[k * cut.pairs + i] * (grad_mask - mean);
    }
    const int64_t to = (pair.pixel * p.group + pair.group) * points + k;
    narrow(grad_mask, static_cast<T*>(p.grad_mask) + to);
    Pack<T, 2> both;
    narrow(gradient.x_low, &both.numbers[0]);
    narrow(gradient.x_high, &both.numbers[1]);
    reinterpret_cast<Pack<T, 2>*>(p.grad_offset)[to] = both;
  }
}

// The gradient of the input alone, in a fixed order of sums: a block takes one group of one image, a
// thread owns channels, and goes through all output pixels in order. Slow, for deterministic mode.
template <typename T>
__global__ void __launch_bounds__(kThreads) ordered_kernel(Backward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;  // of one pixel a pair
  DCNV3_SHARED(memory);
  Axes<A>* const weights = reinterpret_cast<Axes<A>*>(memory);  // [points][pairs], times the mask
  int* const places = reinterpret_cast<int*>(weights + cut.points * cut.pairs);
  const int64_t image = blockIdx.x / p.group, group = blockIdx.x % p.group;
  const int64_t out_pixels = p.out_height * p.out_width, all = p.group * p.channels;
  A* const grad_input = static_cast<A*>(a.accumulator) + image * p.height * p.width * all + group * p.channels;

  for (int64_t first = 0; first < out_pixels; first += cut.pairs) {
    const int count = int(out_pixels - first < cut.pairs ? out_pixels - first : cut.pairs);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Pair pair{true, image * out_pixels + first + i, group};
      visit_points<T, 0, int64_t>(p, cut, pair, [&](int k, A mask, const Axis<A>& h, const Axis<A>& v) {
        const A low = v.low_weight * mask, high = v.high_weight * mask;
        weights[k * cut.pairs + i] = {low * h.low_weight, low * h.high_weight, high * h.low_weight,
                                      high * h.high_weight};
        places[k * cut.pairs + i] = pack_place(h.low, h.high, v.low, v.high, int(p.width));
      });
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
      for (int i = 0; i < count; ++i) {
        const int64_t pixel = image * out_pixels + first + i;
        const A grad = widen(static_cast<const T*>(p.grad_output)[pixel * all + group * p.channels + c]);
        for (int k = 0; k < cut.points; ++k) {
          const Axes<A> w = weights[k * cut.pairs + i];
          const int place = places[k * cut.pairs + i];
          A* const low = grad_input + int64_t(place >> 2) * all + c;
          const int64_t right = (place & 1) ? all : 0, below = (place & 2) ? p.width * all : 0;
          low[0] += grad * w.x_low;
          low[right] += grad * w.x_high;
          low[below] += grad * w.y_low;
          low[below + right] += grad * w.y_high;
        }
      }
    }
    __syncthreads();
  }
}

template <typename T>
const char* backward(const Problem& p, void* accumulator, bool deterministic, void* stream) {
  using A = Accumulator<T>;
  constexpr int point_bytes = kPointBytes<A>, size = kVectorBytes / sizeof(T);
  Backward a{p, cut_of(p, point_bytes), deterministic ? nullptr : accumulator, 1};
  if (a.cut.pairs == 0) return kTooManyPoints;
  if (too_many_pixels(p)) return kTooManyPixels;
  const int64_t shared = int64_t(a.cut.pairs) * (a.cut.points * point_bytes + sizeof(int64_t));
  const void* tensors[] = {p.input, p.grad_output, accumulator};
  const int64_t vectors = p.channels / size;
  const bool fast = fits_vectors(p, a.cut, sizeof(T), tensors, 3) && vectors <= 32 && (vectors & (vectors - 1)) == 0;
  while (a.lanes < 32 && a.lanes < (fast ? vectors : p.channels)) a.lanes *= 2;
  const char* error = fast ? launch(backward_kernel<T, 9, size, int>, a, a.cut.blocks, shared, stream)
                           : launch(backward_kernel<T, 0, 1, int64_t>, a, a.cut.blocks, shared, stream);
  if (error || !deterministic) return error;
  a.accumulator = accumulator;
  return launch(ordered_kernel<T>, a, p.batch * p.group, shared, stream);
}

}  // namespace

const char* cuda_backward(const Problem& p, void* accumulator, bool deterministic, void* stream) {
  switch (p.dtype) {
    case Dtype::float64: return backward<double>(p, accumulator, deterministic, stream);
    case Dtype::float32: return backward<float>(p, accumulator, deterministic, stream);
    case Dtype::float16: return backward<Float16>(p, accumulator, deterministic, stream);
    case Dtype::bfloat16: return backward<BFloat16>(p, accumulator, deterministic, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
