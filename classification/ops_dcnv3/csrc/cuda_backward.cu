// The backward pass for any shape, and which kernel a problem takes; cuda_backward.h says how the kernels differ.
#include "cuda_backward.h"

namespace dcnv3 {
namespace {

struct Backward {
  Problem problem;  // grad_input: the sums, of type Accumulator<T>
  Cut cut;
  bool scatter;  // step 2 is done here
};

template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) atomic_kernel(Backward a) {
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  DCNV3_SHARED(memory);
  const Shared<Accumulator<T>, kPoints, Index, true> shared(memory, cut);
  const Span<Index> span = span_of<Index>(cut, blockIdx.x);
  locate<T>(p, cut, span, shared);
  __syncthreads();
  if (a.scatter) scatter<T>(p, cut, span, shared, [](int, int) { return true; });
  __syncthreads();
  multiply<T, size>(p, cut, span, shared);
  __syncthreads();
  combine<T>(p, cut, span, shared);
  __syncthreads();
  write<T>(p, cut, span, shared);
}

// Step 2 alone, in a fixed order of sums: a block takes one group of one image, a thread owns channels and
// goes through all output pixels in order.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) ordered_kernel(Backward a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;  // one group a block
  DCNV3_SHARED(memory);
  const Shared<A, 0, int64_t, true> shared(memory, cut);
  const Distances<int64_t> far(p);
  const int64_t image = blockIdx.x / p.group, group = blockIdx.x % p.group, all = p.group * p.channels;
  const int64_t begin = image * p.out_height * p.out_width, end = begin + p.out_height * p.out_width;
  for (int64_t first = begin; first < end; first += cut.pairs) {
    const Span<int64_t> span{first, end, group};
    locate<T>(p, cut, span, shared);
    __syncthreads();
    for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
      for (int i = 0; i < cut.pairs; ++i) {
        const Pair<int64_t> pair = pair_of(cut, span, i);
        if (!pair.valid) break;
        const A grad = widen(static_cast<const T*>(p.grad_output)[first_channel(p, pair) + c]);
        for (int k = 0; k < cut.points; ++k) {
          const Corners<A> corners = shared.corners[shared.at(k, i)];
          const int64_t place = shared.places[shared.at(k, i)].numbers[0];
          A* const to = static_cast<A*>(p.grad_input) + place * all + group * p.channels + c;
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
const char* backward(const Problem& whole, BackwardKernel kernel, void* stream) {
  using A = Accumulator<T>;
  constexpr int vector = kVectorBytes / sizeof(T);
  const bool ordered = kernel == BackwardKernel::ordered;
  return in_parts(whole, sizeof(T), sizeof(A), [&](const Problem& p, bool reached) {
    const void* tensors[] = {p.input, p.grad_output, p.grad_input};
    using InShared = Shared<A, 0, int64_t, true>;
    const char* error;
    if (reached && fits_vectors(p, vector, sizeof(T), tensors, 3)) {
      using InShared = Shared<A, 9, uint32_t, true>;
      const Backward a{p, cut_of(p, vector, InShared::kPointBytes, most_groups_of(p)), !ordered};
      error = launch(atomic_kernel<T, 9, vector, uint32_t>, a, a.cut.blocks, InShared::bytes(a.cut), stream);
    } else {
      const Backward a{p, cut_of(p, 1, InShared::kPointBytes, most_groups_of(p)), !ordered};
      if (a.cut.blocks == 0) return kTooManyPoints;
      error = launch(atomic_kernel<T, 0, 1, int64_t>, a, a.cut.blocks, InShared::bytes(a.cut), stream);
    }
    if (error || !ordered) return error;
    const Backward a{p, cut_of(p, 1, InShared::kPointBytes, 1), true};
    return launch(ordered_kernel<T>, a, p.batch * p.group, InShared::bytes(a.cut), stream);
  });
}

}  // namespace

// InternImage-B, batch 32, an H200 (README.md): dense products beat the others at every level. Without them, in
// float32, tiled takes .126 ms at 14x14 where owning takes .233 and atomic .197, and as long as owning at 7x7. Not
// measured on an A100, where a multiprocessor holds still fewer blocks of owning: 2, where it has 6 of tiled.
BackwardKernel suited_kernel(const Shape& shape, bool deterministic) {
  const bool owning = shape.owning_pays && (shape.owning_is_dense || !shape.tiled_pays);
  if (owning || (deterministic && shape.owning_fits)) return BackwardKernel::owning;
  return deterministic ? BackwardKernel::ordered : shape.tiled_pays ? BackwardKernel::tiled : BackwardKernel::atomic;
}

const char* cuda_backward_kernel(const Problem& p, const char* asked, bool deterministic, BackwardKernel* kernel) {
  const auto is = [asked](const char* name) { return strcmp(asked, name) == 0; };
  if (!asked || is("")) {
    *kernel = suited_kernel({owning_fits(p), owning_pays(p), tiled_pays(p), dense_fits(p, true)}, deterministic);
  } else if (is("atomic") || is("tiled")) {
    if (deterministic) return "its sums are in no fixed order, and torch.use_deterministic_algorithms asks for one";
    if (is("tiled") && !tiled_fits(p)) return "8x8 output pixels of a group do not fit in the shared memory of a block";
    *kernel = is("tiled") ? BackwardKernel::tiled : BackwardKernel::atomic;
  } else if (is("ordered")) {
    *kernel = BackwardKernel::ordered;
  } else if (is("owning")) {
    if (!owning_fits(p)) return "a group of one image does not fit in the shared memory of a block";
    *kernel = BackwardKernel::owning;
  } else {
    return "there is no such kernel";
  }
  return nullptr;
}

const char* cuda_backward(const Problem& p, BackwardKernel kernel, void* stream) {
  if (kernel == BackwardKernel::owning) return owning_backward(p, stream);
  if (kernel == BackwardKernel::tiled) return tiled_backward(p, stream);
  switch (p.dtype) {
    case Dtype::float64: return backward<double>(p, kernel, stream);
    case Dtype::float32: return backward<float>(p, kernel, stream);
    case Dtype::float16: return backward<Float16>(p, kernel, stream);
    case Dtype::bfloat16: return backward<BFloat16>(p, kernel, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
