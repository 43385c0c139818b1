// The forward pass on a GPU; cuda_common.h says how the work is cut.
#include "cuda_common.h"

namespace dcnv3 {
namespace {

struct Forward {
  Problem problem;
  Cut cut;
};

template <typename A>
struct alignas(16) Corners {
  A weight[4];  // (low y, low x), (low, high), (high, low), (high, high)
};

template <int size, typename T, typename A>
__device__ inline void add_corner(const T* from, A weight, A* sum) {
  const Pack<T, size> pack = *reinterpret_cast<const Pack<T, size>*>(from);
#pragma unroll
  for (int i = 0; i < size; ++i) sum[i] += widen(pack.numbers[i]) * weight;
}

// kPoints = 0: any number. size: channels at a time. Index: holds an element's number in its image,
// and a pixel's in the batch.
template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  const int points = kPoints ? kPoints : cut.points;
  DCNV3_SHARED(memory);
  // [points][pairs], [pairs] and [points][pairs]: neighbouring threads meet in no bank.
  Corners<A>* const corners = reinterpret_cast<Corners<A>*>(memory);
  int64_t* const bases = reinterpret_cast<int64_t*>(corners + points * cut.pairs);  // -1 beyond the end
  int* const places = reinterpret_cast<int*>(bases + cut.pairs);

  for (int i = threadIdx.x; i < cut.pairs; i += kThreads) {
    const Pair pair = pair_of(p, cut, blockIdx.x, i);
    bases[i] = -1;
    if (!pair.valid) continue;
    bases[i] = visit_points<T, kPoints, Index>(p, cut, pair, [&](int k, A mask, const Axis<A>& h, const Axis<A>& v) {
      const A low = v.low_weight * mask, high = v.high_weight * mask;
      const int to = k * cut.pairs + i;
      corners[to] = {{low * h.low_weight, low * h.high_weight, high * h.low_weight, high * h.high_weight}};
      places[to] = pack_place(h.low, h.high, v.low, v.high, int(p.width));
    });
  }
  __syncthreads();

  const Index all = Index(p.group * p.channels), line = Index(p.width) * all;
  const int vectors = int(p.channels / size);
  for (int item = threadIdx.x; item < cut.pairs * vectors; item += kThreads) {
    const int i = item / vectors, channel = item % vectors * size;
    const int64_t base = bases[i];
    if (base < 0) continue;
    const T* const input = static_cast<const T*>(p.input) + base + channel;
    A sum[size] = {};
#pragma unroll
    for (int k = 0; k < points; ++k) {
      const Corners<A> c = corners[k * cut.pairs + i];
      const int place = places[k * cut.pairs + i];
      const Index right = (place & 1) ? all : Index(0), below = (place & 2) ? line : Index(0);
      const T* const from = input + Index(place >> 2) * all;
      add_corner<size>(from, c.weight[0], sum);
      add_corner<size>(from + right, c.weight[1], sum);
      add_corner<size>(from + below, c.weight[2], sum);
      add_corner<size>(from + below + right, c.weight[3], sum);
    }
    Pack<T, size> result;
#pragma unroll
    for (int j = 0; j < size; ++j) narrow(sum[j], &result.numbers[j]);
    const Pair pair = pair_of(p, cut, blockIdx.x, i);
    T* const output = static_cast<T*>(p.output) + (pair.pixel * p.group + pair.group) * p.channels + channel;
    *reinterpret_cast<Pack<T, size>*>(output) = result;
  }
}

template <typename T>
const char* forward(const Problem& p, void* stream) {
  constexpr int point_bytes = sizeof(Corners<Accumulator<T>>) + sizeof(int);
  const Forward a{p, cut_of(p, point_bytes)};
  if (a.cut.pairs == 0) return kTooManyPoints;
  if (too_many_pixels(p)) return kTooManyPixels;
  const int64_t shared = int64_t(a.cut.pairs) * (a.cut.points * point_bytes + sizeof(int64_t));
  const void* tensors[] = {p.input, p.output};
  return fits_vectors(p, a.cut, sizeof(T), tensors, 2)
             ? launch(forward_kernel<T, 9, kVectorBytes / sizeof(T), int>, a, a.cut.blocks, shared, stream)
             : launch(forward_kernel<T, 0, 1, int64_t>, a, a.cut.blocks, shared, stream);
}

}  // namespace

const char* cuda_forward(const Problem& p, void* stream) {
  switch (p.dtype) {
    case Dtype::float64: return forward<double>(p, stream);
    case Dtype::float32: return forward<float>(p, stream);
    case Dtype::float16: return forward<Float16>(p, stream);
    case Dtype::bfloat16: return forward<BFloat16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
