// The tiled kernel of the backward pass; cuda_backward.h says how the kernels differ. In an image too large for
// the owning kernel (56x56 and 28x28 pixels of InternImage-B) neighbouring output pixels still sample the same
// input. So a block takes 8x8 output pixels of one group and looks at the 16x16 input pixels around them, the
// window. Each pixel of the window gathers what all points of the tile give to it, in registers, and adds the
// sum to memory once: 2 to 3 adds an output pixel, where its corners are 36. A point with a corner outside the
// window is added to memory as in the atomic kernel.
//
// A pixel of the window has a list of the corners that lie on it. To put a corner into a list is one exchange of
// integers. Sums in shared memory would take compare-and-swap loops, or a window of sums for every warp that
// adds: room for two or three blocks of a multiprocessor, where this leaves six or seven.
#include "cuda_backward.h"

namespace dcnv3 {
namespace {

struct Tiled {
  Problem problem;  // grad_input: the sums, of type Accumulator<T>
  Cut cut;          // one group a block
  Tiling tiling;
  Divisor width;  // of the input
  Divisor lanes;  // threads of a pixel of the window
  int64_t list_bytes, bytes;
};

// Shared memory beside the points. Corner q of point k of pair i has the number (k * kPairs + i) * 4 + q.
constexpr uint16_t kEnd = 0xffff, kOutside = 0xfffe;
template <typename A>
struct Lists {
  A* const grads;        // output gradients: [pair][thread of a window's pixel][its channels]
  int* const first;      // [row][column of the window]: number of a corner, or kEnd
  uint16_t* const next;  // [corner]: the next one of its pixel, or kEnd; kOutside if its point is not listed
  __device__ Lists(void* memory, int channels)
      : grads(static_cast<A*>(memory)), first(reinterpret_cast<int*>(grads + kPairs * channels)),
        next(reinterpret_cast<uint16_t*>(first + kWindow * kWindow)) {}
  static int64_t bytes(int64_t channels, int64_t points) {
    return kPairs * (channels * int64_t(sizeof(A)) + points * 4 * 2) + kWindow * kWindow * 4;
  }
};

// The channel of number j of a thread's `size`: neighbours where one instruction adds all of them. Where it adds
// one of each thread, those of neighbouring threads are.
template <int size, int vector>
__device__ inline int channel_of(int lane, int lanes, int j) {
  return vector == size ? lane * size + j : j * lanes + lane;
}

// What step 2 needs: the lists of corners, and the output gradients.
template <typename T, int size, int vector, int kPoints, typename Index>
__device__ inline void link(const Tiled& a, const Tile<Index>& tile, int top, int left,
                            const Lists<Accumulator<T>>& lists,
                            const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const int lanes = a.lanes.value;
  for (int item = threadIdx.x; item < shared.points * kPairs; item += kThreads) {
    const int k = item / kPairs, i = item % kPairs;
    if (!pair_of(a.cut, tile, i).valid) continue;
    const Index pixel = shared.places[shared.at(k, i)].numbers[0] - tile.image * Index(p.height * p.width);
    const int row = int(a.width.quotient(pixel)), y = row - top, x = int(pixel) - row * int(p.width) - left;
    // With the high corners, one row and one column on.
    const bool inside = y >= 0 && y < kWindow - 1 && x >= 0 && x < kWindow - 1;
    const Corners<A> corners = shared.corners[shared.at(k, i)];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int corner = item * 4 + q;
      uint16_t next = inside ? kEnd : kOutside;
      if (inside && corners.weight[q] != A(0))
        next = uint16_t(atomicExch(&lists.first[(y + q / 2) * kWindow + x + q % 2], corner));
      lists.next[corner] = next;
    }
  }
  for (int item = threadIdx.x; item < kPairs * lanes; item += kThreads) {
    const int i = int(a.lanes.quotient(uint32_t(item))), lane = item - i * lanes;
    const Pair<Index> pair = pair_of(a.cut, tile, i);
    if (!pair.valid) continue;
    const T* const from = static_cast<const T*>(p.grad_output) + first_channel(p, pair);
#pragma unroll
    for (int j = 0; j < size; ++j) lists.grads[item * size + j] = widen(from[channel_of<size, vector>(lane, lanes, j)]);
  }
}

// Step 2, of the points in the window: a few threads a pixel, each summing `size` channels.
template <typename T, int size, int vector, int kPoints, typename Index>
__device__ inline void gather(const Tiled& a, const Tile<Index>& tile, int top, int left,
                              const Lists<Accumulator<T>>& lists,
                              const Shared<Accumulator<T>, kPoints, Index, true>& shared) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const int lanes = a.lanes.value;
  for (int item = threadIdx.x; item < kWindow * kWindow * lanes; item += kThreads) {
    const int number = int(a.lanes.quotient(uint32_t(item))), lane = item - number * lanes;
    // Pixels by 2x4, which a warp takes together: their lists are about as long.
    const int y = number / 32 * 2 + number % 8 / 4, x = (number / 8 + number / 32) % 4 * 4 + number % 4;
    uint32_t corner = lists.first[y * kWindow + x];
    if (corner == kEnd) continue;  // perhaps no pixel of the image
    A sum[size] = {};
    for (; corner != kEnd; corner = lists.next[corner]) {
      const int q = corner % 4, i = corner / 4 % kPairs, k = corner / (4 * kPairs);
      const A weight = shared.corners[shared.at(k, i)].weight[q];
      const Pack<A, size> grad = load<size>(lists.grads + (i * lanes + lane) * size);
#pragma unroll
      for (int j = 0; j < size; ++j) sum[j] += grad.numbers[j] * weight;
    }
    const Index place = (tile.image * Index(p.height) + Index(top + y)) * Index(p.width) + Index(left + x);
    A* const to = static_cast<A*>(p.grad_input) + (place * Index(p.group) + tile.group) * Index(p.channels);
#pragma unroll
    for (int j = 0; j < size; j += vector) add_to<vector>(to + channel_of<size, vector>(lane, lanes, j), sum + j);
  }
}

// kPoints = 0: any number. size: channels at a time.
template <typename T, int kPoints, int size, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks<T> - 1) tiled_kernel(Tiled a) {
  using A = Accumulator<T>;
  const Problem& p = a.problem;
  const Cut& cut = a.cut;
  DCNV3_SHARED(memory);
  const Lists<A> lists(memory, int(p.channels));
  const Shared<A, kPoints, Index, true> shared(reinterpret_cast<char*>(memory) + a.list_bytes, cut);
  const Tile<Index> tile = tile_of<Index>(a.tiling, blockIdx.x);
  const int top = window_of(tile.row, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  const int left = window_of(tile.column, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  for (int i = threadIdx.x; i < kWindow * kWindow; i += kThreads) lists.first[i] = kEnd;
  locate<T>(p, cut, tile, shared);
  __syncthreads();
  constexpr int sums = kPoints ? int(kVectorBytes / sizeof(A)) : 1;  // of a thread
  constexpr int vector = vector_of<A, kPoints>;
  link<T, sums, vector>(a, tile, top, left, lists, shared);
  __syncthreads();
  scatter<T>(p, cut, tile, shared, [&](int k, int i) { return lists.next[(k * kPairs + i) * 4] == kOutside; });
  gather<T, sums, vector>(a, tile, top, left, lists, shared);
  __syncthreads();
  multiply<T, size>(p, cut, tile, shared);
  __syncthreads();
  combine<T>(p, cut, tile, shared);
  __syncthreads();
  write<T>(p, cut, tile, shared);
}

// How the kernel of these types would take the problem; bytes = 0: not at all.
template <typename T, int kPoints, int size, typename Index>
Tiled tiling_of(const Problem& p) {
  using A = Accumulator<T>;
  using InShared = Shared<A, kPoints, Index, true>;
  const int64_t list_bytes = Lists<A>::bytes(p.channels, point_count(p.kernel_h, p.kernel_w, p.remove_center));
  Tiled a{p, cut_of(p, size, InShared::kPointBytes, 1, kMostSharedBytes - list_bytes), Tiling(p), Divisor(p.width),
          Divisor(kPoints ? p.channels * int64_t(sizeof(A)) / kVectorBytes : p.channels), list_bytes, 0};
  const int64_t bytes = list_bytes + InShared::bytes(a.cut);
  if (a.cut.pairs == kPairs && bytes <= kMostSharedBytes) a.bytes = bytes;
  return a;
}

template <typename T, int kPoints, int size, typename Index>
const char* start_tiled(const Problem& p, void* stream) {
  const Tiled a = tiling_of<T, kPoints, size, Index>(p);
  if (a.bytes == 0) return "the tiled kernel does not fit";
  return launch(tiled_kernel<T, kPoints, size, Index>, a, a.tiling.blocks, a.bytes, stream);
}

template <typename T>
const char* by_tiles(const Problem& whole, void* stream) {
  constexpr int vector = kVectorBytes / sizeof(T);
  return in_parts(whole, sizeof(T), sizeof(Accumulator<T>), [&](const Problem& p, bool reached) {
    const void* tensors[] = {p.input, p.grad_output, p.grad_input};
    if (!reached || !fits_vectors(p, vector, sizeof(T), tensors, 3)) return start_tiled<T, 0, 1, int64_t>(p, stream);
    return dense_fits(p, false) ? dense_backward(p, false, stream) : start_tiled<T, 9, vector, uint32_t>(p, stream);
  });
}

// Of a block. The version for any problem needs the most.
int64_t shared_bytes_of(const Problem& p) {
  const Tiled a = p.dtype == Dtype::float64 ? tiling_of<double, 0, 1, int64_t>(p) : tiling_of<float, 0, 1, int64_t>(p);
  return a.bytes ? a.bytes : kMostSharedBytes + 1;
}

}  // namespace

bool tiled_fits(const Problem& p) { return shared_bytes_of(p) <= kMostSharedBytes; }

// With strides the tile's points are too far apart to share corners, with unfilled tiles threads are idle, and
// with half of the shared memory or more a multiprocessor has few blocks.
bool tiled_pays(const Problem& p) {
  const int64_t filled = p.out_height * p.out_width;
  const int64_t tiles = ((p.out_width + kTile - 1) / kTile) * ((p.out_height + kTile - 1) / kTile);
  return p.stride_h == 1 && p.stride_w == 1 && 4 * filled >= 3 * tiles * kPairs &&
         shared_bytes_of(p) <= kMostSharedBytes / 2;
}

const char* tiled_backward(const Problem& p, void* stream) {
  switch (p.dtype) {
    case Dtype::float64: return by_tiles<double>(p, stream);
    case Dtype::float32: return by_tiles<float>(p, stream);
    case Dtype::float16: return by_tiles<Float16>(p, stream);
    case Dtype::bfloat16: return by_tiles<BFloat16>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace dcnv3
