// The owning kernel of the backward pass; cuda_backward.h says how the kernels differ. Where a group of one
// image is small (14x14 and 7x7 pixels: 25 of the 33 blocks of InternImage-B), a block owns it: it goes
// through all output pixels of the group in spans, sums the gradient of the input in shared memory, and
// writes it once, in its own type. No atomic adds, no zeros beforehand, no cast afterwards, and always the
// same order of sums.
//
// Warps that added to one tile of sums would meet in it, so each warp has a tile of its own, and the tiles
// are added up in the end. Where shared memory holds fewer tiles than warps, that many warps add.
#include "cuda_backward.h"

namespace dcnv3 {
namespace {

struct Owning {
  Problem problem;  // grad_input: of type T
  Cut cut;          // one group a block
  int tiles, tile_bytes;
};

// Step 2. A warp takes a point: 4 corners by 8 threads of `size` channels each. The corners of one point are
// four places, those of two points may be the same: the points of a tile are added one after the other.
template <typename T, int size, int kPoints, typename Index>
__device__ inline void accumulate(const Problem& p, const Cut& cut, int tiles, const Span<Index>& span,
                                  Index first_pixel, Accumulator<T>* tile,
                                  const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  const int warp = threadIdx.x / 32, corner = threadIdx.x % 32 / 8, lane = threadIdx.x % 8;
  const int channels = int(p.channels), below = corner / 2 * int(p.width), beside = corner % 2;
  // In an input of one row or column the high corners have no weight.
  A* const from_corner = tile + (below + beside) * channels;
  for (int i = warp; i < cut.pairs; i += tiles) {
    const Pair<Index> pair = pair_of(cut, span, i);
    if (!pair.valid) break;
    const T* const grad_output = static_cast<const T*>(p.grad_output) + first_channel(p, pair);
    for (int c = lane * size; c - lane * size < channels; c += 8 * size) {  // whole warps, to the end
      A grad[size] = {};
      if (c < channels) widen(load<size>(grad_output + c), grad);
      // All points are read before the first sum is written: behind it the compiler could not read ahead.
      constexpr int at_once = kPoints ? kPoints : 1;
      for (int first = 0; first < shared.points; first += at_once) {
        A weight[at_once];
        int pixel[at_once];
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          weight[k] = shared.corners[shared.at(first + k, i)].weight[corner];
          pixel[k] = int(shared.places[shared.at(first + k, i)].numbers[0] - first_pixel);
        }
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          if (weight[k] != A(0) && c < channels) {
            Pack<A, size>* const to = reinterpret_cast<Pack<A, size>*>(from_corner + pixel[k] * channels + c);
            Pack<A, size> sum = *to;
#pragma unroll
            for (int j = 0; j < size; ++j) sum.numbers[j] += grad[j] * weight[k];
            *to = sum;
          }
          __syncwarp();
        }
        if (kPoints) break;
      }
    }
  }
}

// kPoints = 0: any number. size: channels at a time.
template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks<T> / 2) owning_kernel(Owning a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  DCNV3_SHARED(memory);
  char* const tiles = reinterpret_cast<char*>(memory);
  const auto tile = [&](int t) { return reinterpret_cast<A*>(tiles + t * a.tile_bytes); };
  const Shared<A, kPoints, Index, true> shared(tiles + a.tiles * a.tile_bytes, cut);
  const int pixels = int(p.height * p.width), channels = int(p.channels), warp = threadIdx.x / 32;
  const Index image = Index(blockIdx.x / uint32_t(p.group)), group = Index(blockIdx.x % uint32_t(p.group));
  const Index first_pixel = image * Index(pixels), out_pixels = Index(p.out_height * p.out_width);
  for (int i = threadIdx.x; i < a.tiles * a.tile_bytes / kVectorBytes; i += kThreads)
    reinterpret_cast<Pack<A, kVectorBytes / sizeof(A)>*>(tiles)[i] = {};

  for (Index first = 0; first < out_pixels; first += Index(cut.pixels_per_block)) {
    const Span<Index> span{image * out_pixels + first, (image + 1) * out_pixels, group};
    locate<T>(p, cut, span, shared);
    __syncthreads();
    constexpr int together = kPoints ? 2 : 1;
    if (warp < a.tiles) accumulate<T, together>(p, cut, a.tiles, span, first_pixel, tile(warp), shared);
    __syncthreads();
    multiply<T, size>(p, cut, span, shared);
    __syncthreads();
    combine<T>(p, cut, span, shared);
    __syncthreads();
    write<T>(p, cut, span, shared);
    __syncthreads();
  }

  const int vectors = channels / size;  // of a pixel
  for (int i = threadIdx.x; i < pixels * vectors; i += kThreads) {
    const int pixel = i / vectors, c = i % vectors * size;
    constexpr int together = smaller_of(size, int(kVectorBytes / sizeof(A)));
    A sum[size] = {};
    for (int t = 0; t < a.tiles; ++t) {
#pragma unroll
      for (int j = 0; j < size; j += together) {
        const Pack<A, together> part = load<together>(tile(t) + pixel * channels + c + j);
#pragma unroll
        for (int m = 0; m < together; ++m) sum[j + m] += part.numbers[m];
      }
    }
    Pack<T, size> result;
#pragma unroll
    for (int j = 0; j < size; ++j) narrow(sum[j], &result.numbers[j]);
    const Index to = ((first_pixel + Index(pixel)) * Index(p.group) + group) * Index(channels) + Index(c);
    *reinterpret_cast<Pack<T, size>*>(static_cast<T*>(p.grad_input) + to) = result;
  }
}

// A tile for every warp, unless a multiprocessor then holds one block only, as with 100 KB of shared memory.
int most_tiles() {
  constexpr int of_warps = kThreads / 32;
  return 2 * (kMostSharedBytes + kReserved) <= device().shared_bytes ? of_warps : of_warps / 2;
}

// How the kernel of these types would take the problem; tiles = 0: not at all.
template <typename T, int kPoints, int size, typename Index>
Owning plan(const Problem& p) {
  using InShared = Shared<Accumulator<T>, kPoints, Index, true>;
  Owning a;
  a.problem = p, a.tiles = 0;
  const int64_t tile_bytes = (p.height * p.width * p.channels * int64_t(sizeof(Accumulator<T>)) + 15) / 16 * 16;
  if (tile_bytes > kMostSharedBytes) return a;
  a.tile_bytes = int(tile_bytes);
  for (int tiles = most_tiles(); tiles > 0; tiles /= 2) {
    const int64_t room = kMostSharedBytes - tiles * tile_bytes;
    a.cut = cut_of(p, size, InShared::kPointBytes, 1, room);
    if (a.cut.pairs == 0) continue;
    // Spans of like length: four of 49 pixels in an image of 14x14, not three of 64 and one of 4.
    const int64_t pixels = p.out_height * p.out_width, spans = (pixels + a.cut.pairs - 1) / a.cut.pairs;
    a.cut.pairs = a.cut.pixels_per_block = int((pixels + spans - 1) / spans);
    if (InShared::bytes(a.cut) > room) continue;
    a.tiles = tiles;
    break;
  }
  return a;
}

template <typename T, int kPoints, int size, typename Index>
const char* start(const Problem& p, void* stream) {
  const Owning a = plan<T, kPoints, size, Index>(p);
  if (a.tiles == 0) return "the owning kernel does not fit";
  const int64_t bytes = a.tiles * a.tile_bytes + Shared<Accumulator<T>, kPoints, Index, true>::bytes(a.cut);
  return launch(owning_kernel<T, kPoints, size, Index>, a, p.batch * p.group, bytes, stream);
}

template <typename T>
const char* own(const Problem& whole, void* stream) {
  constexpr int vector = kVectorBytes / sizeof(T);
  return in_parts(whole, sizeof(T), sizeof(T), [&](const Problem& p, bool reached) {
    const void* tensors[] = {p.input, p.grad_output, p.grad_input};
    if (!reached || !fits_vectors(p, vector, sizeof(T), tensors, 3)) return start<T, 0, 1, int64_t>(p, stream);
    return dense_fits(p, true) ? dense_backward(p, true, stream) : start<T, 9, vector, uint32_t>(p, stream);
  });
}

// Both versions have to fit: which one it will be, the addresses of tensors decide.
template <typename T>
int tiles_of(const Problem& p) {
  constexpr int vector = kVectorBytes / sizeof(T);
  const void* tensors[] = {p.input, p.grad_output};
  const int general = plan<T, 0, 1, int64_t>(p).tiles;
  return fits_vectors(p, vector, sizeof(T), tensors, 2) ? smaller_of(plan<T, 9, vector, uint32_t>(p).tiles, general) : general;
}

int tiles_of(const Problem& p) {
  switch (p.dtype) {
    case Dtype::float64: return tiles_of<double>(p);
    case Dtype::float32: return tiles_of<float>(p);
    case Dtype::float16: return tiles_of<Float16>(p);
    case Dtype::bfloat16: return tiles_of<BFloat16>(p);
  }
  return 0;
}

// Fewer blocks than two a multiprocessor of an A100 or H100 would leave some of them idle.
#ifdef DCNV3_TEST_OWNING_BLOCKS
constexpr int64_t kOwningBlocks = DCNV3_TEST_OWNING_BLOCKS;
#else
constexpr int64_t kOwningBlocks = 256;
#endif

}  // namespace

bool owning_fits(const Problem& p) { return tiles_of(p) > 0; }

bool owning_pays(const Problem& p) {
  return p.batch * p.group >= kOwningBlocks && (dense_fits(p, true) || tiles_of(p) == most_tiles());
}

const char* owning_backward(const Problem& p, void* stream) {
  switch (p.dtype) {
    case Dtype::float64: return own<double>(p, stream);
    case Dtype::float32: return own<float>(p, stream);
    case Dtype::float16: return own<Float16>(p, stream);
    case Dtype::bfloat16: return own<BFloat16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
