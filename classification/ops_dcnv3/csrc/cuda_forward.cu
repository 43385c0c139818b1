// The forward pass on a GPU; cuda_common.h says how the work is cut.
#include "cuda_common.h"

namespace dcnv3 {
namespace {

struct Forward {
  Problem problem;
  Cut cut;
};

template <int size, typename T, typename A>
__device__ inline void add_corner(const T* from, A weight, A* sum) {
  A numbers[size];
  widen(load<size>(from), numbers);
#pragma unroll
  for (int i = 0; i < size; ++i) sum[i] += numbers[i] * weight;
}

// kPoints = 0: any number. size: channels at a time.
template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) forward_kernel(Forward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  DCNV3_SHARED(memory);
  const Shared<A, kPoints, Index, false> shared(memory, cut);
  const Span<Index> span = span_of<Index>(cut, blockIdx.x);
  locate<T>(p, cut, span, shared);
  __syncthreads();

  const Index all = Index(p.group * p.channels);
  const T* const upper = hidden(static_cast<const T*>(p.input));
  const T* const lower = hidden(static_cast<const T*>(p.input) + Distances<Index>(p).corner[2]);
  for (int item = threadIdx.x; item < cut.pairs * cut.lanes(); item += kThreads) {
    const int i = item >> cut.lane_shift, lane = item & (cut.lanes() - 1);
    const Pair<Index> pair = pair_of(cut, span, i);
    if (!pair.valid) continue;
    for (int c = lane * size; c < int(p.channels); c += cut.lanes() * size) {
      const Index channel = pair.group * Index(p.channels) + Index(c);
      A sum[size] = {};
#pragma unroll
      for (int k = 0; k < shared.points; ++k) {
        const Corners<A> corners = shared.corners[shared.at(k, i)];
        const auto places = shared.places[shared.at(k, i)];
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const Index place = places.numbers[column] * all + channel;
          add_corner<size>(upper + place, corners.weight[column], sum);
          add_corner<size>(lower + place, corners.weight[2 + column], sum);
        }
      }
      Pack<T, size> result;
#pragma unroll
      for (int j = 0; j < size; ++j) narrow(sum[j], &result.numbers[j]);
      const Index to = first_channel(p, pair) + Index(c);
      *reinterpret_cast<Pack<T, size>*>(static_cast<T*>(p.output) + to) = result;
      if (kPoints) break;  // one vector a thread
    }
  }
}

template <typename T>
const char* forward(const Problem& whole, void* stream) {
  using A = Accumulator<T>;
  constexpr int vector = kVectorBytes / sizeof(T);
  return in_parts(whole, sizeof(T), sizeof(A), [&](const Problem& p, bool reached) {
    const void* tensors[] = {p.input, p.output};
    if (reached && fits_vectors(p, vector, sizeof(T), tensors, 2)) {
      using InShared = Shared<A, 9, uint32_t, false>;
      const Forward a{p, cut_of(p, vector, InShared::kPointBytes, most_groups_of(p))};
      return launch(forward_kernel<T, 9, vector, uint32_t>, a, a.cut.blocks, InShared::bytes(a.cut), stream);
    }
    using InShared = Shared<A, 0, int64_t, false>;
    const Forward a{p, cut_of(p, 1, InShared::kPointBytes, most_groups_of(p))};
    if (a.cut.blocks == 0) return kTooManyPoints;
    return launch(forward_kernel<T, 0, 1, int64_t>, a, a.cut.blocks, InShared::bytes(a.cut), stream);
  });
}

}  // namespace

const char* cuda_obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, DCNV3_ENTRY((forward_kernel<float, 9, 4, uint32_t>)));
  if (error != cudaSuccess) cudaGetLastError();
  const bool unfit = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                     error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver;
  return unfit ? cudaGetErrorString(error) : nullptr;  // any other error will be that of the first launch as well
}

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
