// What the CUDA kernels share: how the work is cut into blocks, and its first step.
//
// A "pair" is one output pixel of one group. A block takes some consecutive output pixels times a few
// neighbouring groups, and works in steps. First, one thread a pair: softmax, positions, corners and
// weights of its points go to shared memory, once for all channels. Then the block's threads are dealt
// out again, a few to each pair, each owning up to 16 bytes of its channels.
//
// What bounds these kernels is how many instructions they issue, so: divisions are multiplications,
// the four corners of a point lie at four constant distances from one number, and two versions exist
// of each kernel, one for 3x3 points, all unrolled, with 16-byte vectors and 32-bit indices, and one for
// any kernel, width, alignment and size.
#pragma once

#ifndef DCNV3_EMULATED  // the tests compile this for the CPU, with an imitation of what follows
#include <cuda_runtime.h>
#define DCNV3_SHARED(name) extern __shared__ double2 name[]
#define DCNV3_ENTRY(kernel) reinterpret_cast<const void*>(kernel)  // CUDA 11 takes no other pointer
#endif

#include "dcnv3.h"
#include "dcnv3_math.h"

namespace dcnv3 {
namespace {

constexpr int kThreads = 128;
// Blocks of a multiprocessor at once: leaves 64 registers a thread, 168 where a number takes two.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 3 : 8;
constexpr int kPairs = 64;  // of a block; in InternImage two threads or more work on a pair
constexpr int kSharedBytes = 48 * 1024;  // what a block may use without asking
constexpr int kMostSharedBytes = 64 * 1024;  // what every GPU since sm_75 grants
constexpr int kPadding = 8;              // of which, to bring an array to its border
constexpr int kReserved = 1024;          // besides, CUDA's own part of a block
constexpr int kVectorBytes = 16;
// Elements of a tensor that the 32-bit version reaches: their offsets in bytes fit 32 bits as float32.
#ifdef DCNV3_TEST_REACH
constexpr int64_t kReach = DCNV3_TEST_REACH;
#else
constexpr int64_t kReach = int64_t(1) << 30;
#endif

// Divides numbers below 2^31 by a multiplication and a shift (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t value, factor, shift;
  explicit Divisor(int64_t divisor = 1) : value(uint32_t(divisor)), shift(0) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    factor = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value)) / value + 1);
  }
  DCNV3_INLINE uint32_t quotient(uint32_t n) const {
    return (uint32_t((uint64_t(n) * factor) >> 32) + n) >> shift;
  }
  DCNV3_INLINE int64_t quotient(int64_t n) const { return n / value; }
};

// The cut of a problem into blocks.
struct Cut {
  int points, pairs;       // of a block
  int pixels_per_block;
  int lane_shift;          // threads of a pair: 2 to this power, at most 32
  Divisor groups, chunks;  // groups of a block; how many of those make all groups
  Divisor width, height;   // of the output
  int64_t pixels, blocks;  // output pixels of the batch
  // Eight threads that load 16 bytes each, of neighbouring pairs, do so in one turn if these lie in different parts of
  // a line of memory, 128 bytes. The bit of a pair's place in the input by which the two columns of its corners lie in
  // different parts; 0 where they do not.
  uint32_t other_column;

  DCNV3_INLINE int lanes() const { return 1 << lane_shift; }
};

// Groups of a block, at most. Few groups and many pixels: neighbouring pixels read the same input. But a
// group of 16 bfloat16 channels is a quarter of a line of memory: four groups use all of it. Where four do
// not divide them, up to eight: 7 of 7, where one at a time would leave three quarters of every line.
inline int most_groups_of(const Problem& p) { return p.group % 4 == 0 ? 4 : 8; }

// `point_bytes`: shared memory for one point. A cut with blocks = 0 means that a pair does not fit.
inline Cut cut_of(const Problem& p, int vector, int point_bytes, int most_groups, int64_t shared_bytes = kSharedBytes) {
  Cut cut;
  cut.points = point_count(p.kernel_h, p.kernel_w, p.remove_center);
  const int64_t room = larger_of(shared_bytes - kPadding, int64_t(0)) / (int64_t(cut.points) * point_bytes);
  const int most = int(smaller_of(room, int64_t(kPairs)));
  int groups = smaller_of(most, most_groups);  // a divisor: no thread is idle
  while (groups > 1 && p.group % groups) --groups;
  cut.pixels_per_block = groups ? most / groups : 0;
  cut.pairs = cut.pixels_per_block * groups;
  cut.lane_shift = 0;
  while (cut.lanes() < 32 && cut.lanes() * vector < p.channels) ++cut.lane_shift;
  cut.pixels = p.batch * p.out_height * p.out_width;
  cut.width = Divisor(p.out_width), cut.height = Divisor(p.out_height);
  const uint32_t parts = cut.lanes() < 8 ? 8u / uint32_t(cut.lanes()) : 1;  // a pair's channels each
  cut.other_column = uint32_t(p.group & -p.group) & (parts - 1);
  cut.blocks = 0;
  if (cut.pairs == 0) return cut;
  cut.groups = Divisor(groups), cut.chunks = Divisor(p.group / groups);
  cut.blocks = (cut.pixels + cut.pixels_per_block - 1) / cut.pixels_per_block * cut.chunks.value;
  return cut;
}

// Elements of the largest tensor, for one image.
inline int64_t elements_of_an_image(const Problem& p) {
  const int64_t in = p.height * p.width, out = p.out_height * p.out_width, channels = p.group * p.channels;
  return larger_of(larger_of(in, out) * channels, out * larger_of(p.offset_stride, p.mask_stride));
}

// Whether the version for 3x3 kernels fits: `vector` numbers of `element` bytes at a time.
inline bool fits_vectors(const Problem& p, int vector, int element, const void* const* tensors, int count) {
  const int64_t lanes = p.channels / vector, pair_bytes = 2 * element;  // x and y of an offset are read as one
  bool fits = p.kernel_h == 3 && p.kernel_w == 3 && !p.remove_center && p.height > 1 && p.width > 1 &&
              p.channels % vector == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0 && p.offset_stride % 2 == 0 &&
              reinterpret_cast<uintptr_t>(p.offset) % pair_bytes == 0;
  for (int i = 0; i < count; ++i) fits = fits && reinterpret_cast<uintptr_t>(tensors[i]) % kVectorBytes == 0;
  return fits;
}

// `count` images from `first` on. `element`: bytes of a number; of the input's gradient, `sum_element`.
inline Problem images_of(const Problem& p, int64_t first, int64_t count, int element, int sum_element) {
  const int64_t in = p.height * p.width * p.group * p.channels, out = p.out_height * p.out_width;
  const int64_t points = out * p.group * point_count(p.kernel_h, p.kernel_w, p.remove_center);
  Problem part = p;
  part.batch = count;
  const auto skip = [first](auto*& tensor, int64_t image, int bytes) {  // null where the pass has no such tensor
    const auto address = reinterpret_cast<uintptr_t>(tensor) + first * image * bytes;
    if (tensor) tensor = reinterpret_cast<decltype(+tensor)>(address);
  };
  skip(part.input, in, element), skip(part.grad_input, in, sum_element);
  skip(part.output, out * p.group * p.channels, element), skip(part.grad_output, out * p.group * p.channels, element);
  skip(part.offset, out * p.offset_stride, element), skip(part.mask, out * p.mask_stride, element);
  skip(part.grad_offset, points * 2, element), skip(part.grad_mask, points, element);
  return part;
}

// Calls run(problem, whether 32-bit indices reach) for the batch, in as many parts as that takes. One
// image that alone is too large goes with 64 bits.
template <typename Run>
const char* in_parts(const Problem& p, int element, int sum_element, Run run) {
  const int64_t size = elements_of_an_image(p);
  if (size == 0) return nullptr;
  const int64_t images = size <= kReach ? kReach / size : 1;
  for (int64_t first = 0; first < p.batch; first += images) {
    const int64_t count = smaller_of(p.batch - first, images);
    const char* error = run(images_of(p, first, count, element, sum_element), size <= kReach);
    if (error) return error;
  }
  return nullptr;
}

// `size` numbers that are loaded and stored as one.
template <typename T, int size>
struct alignas(sizeof(T) * size) Pack {
  T numbers[size];
};
// In one instruction: member by member, the compiler may load them one by one.
template <int size, typename T>
DCNV3_INLINE Pack<T, size> load(const T* from) {
  Pack<T, size> pack;
  memcpy(&pack, __builtin_assume_aligned(from, sizeof(pack)), sizeof(pack));
  return pack;
}
template <typename T, int size>
DCNV3_INLINE void widen(const Pack<T, size>& pack, Accumulator<T>* to) {
#pragma unroll
  for (int i = 0; i < size; ++i) to[i] = widen(pack.numbers[i]);
}
// Two at a time: one instruction a number, where taking it out of its word first would be two.
template <int size>
DCNV3_INLINE void widen(const Pack<BFloat16, size>& pack, float* to) {
  if constexpr (size % 2 == 0) {
    const Pack<uint32_t, size / 2> words = bits_as<Pack<uint32_t, size / 2>>(pack);
#pragma unroll
    for (int i = 0; i < size / 2; ++i) {
      to[2 * i] = bits_as<float>(words.numbers[i] << 16);
      to[2 * i + 1] = bits_as<float>(words.numbers[i] & 0xffff0000u);
    }
  } else {
    to[0] = widen(pack.numbers[0]);
  }
}
// Four corners are reached from four pointers by the same offset, one instruction each. Unless they are
// hidden from it, the compiler computes one address from another, two instructions each.
template <typename T>
__device__ inline T* hidden(T* pointer) {
#if defined(__CUDA_ARCH__)
  size_t address = __cvta_generic_to_global(pointer);  // the compiler still has to know that it is global memory
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return pointer;
#endif
}

// What a block works on between two barriers: output pixels of the batch from `first` to before `end`, of
// groups from `group` on. Index: a type that holds an element's number in any of the tensors.
template <typename Index>
struct Span {
  Index first, end, group;
};
template <typename Index>
__device__ inline Span<Index> span_of(const Cut& cut, uint32_t block) {
  const uint32_t tile = cut.chunks.quotient(block);
  return {Index(tile) * Index(cut.pixels_per_block), Index(cut.pixels),
          Index((block - tile * cut.chunks.value) * cut.groups.value)};
}

// Where pair `i` of a span lies; beyond its end, `valid` is false.
template <typename Index>
struct Pair {
  bool valid;
  Index pixel, group;
};
template <typename Index>
__device__ inline Pair<Index> pair_of(const Cut& cut, const Span<Index>& span, uint32_t i) {
  const uint32_t row = cut.groups.quotient(i);
  Pair<Index> pair;
  pair.pixel = span.first + Index(row);
  pair.group = span.group + Index(i - row * cut.groups.value);
  pair.valid = pair.pixel < span.end;
  return pair;
}

// Where the channels of a pair begin in the output.
template <typename Index>
__device__ inline Index first_channel(const Problem& p, const Pair<Index>& pair) {
  return (pair.pixel * Index(p.group) + pair.group) * Index(p.channels);
}

// The pair that a thread works on where it works on points, and which points. Two threads half a warp apart share the
// 3x3 points: the lower one takes the first five, the upper one the last four, from the end. Other points a thread has
// for itself, and half of a block's threads wait: in half of the blocks, by a hash of their number, the lower half, so
// that all four schedulers of a multiprocessor have as much to do. Whole warps go through all steps, because threads
// that share exchange numbers.
template <int kPoints>
struct Share {
  static constexpr bool kShares = kPoints != 0;
  static constexpr int kSharers = kShares ? 2 : 1, kPairsOfWarp = 32 / kSharers, kItems = kThreads / kSharers;
  static constexpr int kSteps = (kPoints + 1) / 2;  // of a thread, with 3x3 points
  bool upper;
  int points;
  __device__ explicit Share(int points) : upper(kShares && threadIdx.x % 32 >= kPairsOfWarp), points(points) {}
  static __device__ int first_pair() {
    if (!kShares) return int(threadIdx.x ^ ((blockIdx.x * 2654435761u >> 31) * (kThreads / 2)));
    return int(threadIdx.x) / 32 * kPairsOfWarp + int(threadIdx.x) % kPairsOfWarp;
  }
  // How many steps a thread makes, which point it takes in step s, and whether it takes one.
  __device__ int steps() const { return kPoints ? kSteps : points; }
  __device__ int point(int s) const { return upper ? kPoints - 1 - s : s; }
  __device__ bool has(int s) const { return !(upper && s == kPoints / 2); }
  template <typename A>
  static __device__ A sum(A mine) {
    return kShares ? mine + __shfl_xor_sync(~0u, mine, kPairsOfWarp) : mine;
  }
};

// The points of one pair. kPoints = 0: any number, otherwise 9 of a 3x3 kernel.
template <typename T, int kPoints, typename Index>
struct Points {
  using A = Accumulator<T>;
  const Problem& problem;
  const T* offset;
  A x, y, scale;  // of kernel element 0 without an offset
  Index image;

  __device__ Points(const Problem& p, const Cut& cut, const Pair<Index>& pair) : problem(p), scale(A(p.offset_scale)) {
    const Index row_of_batch = cut.width.quotient(pair.pixel);
    image = cut.height.quotient(row_of_batch);
    const int column = int(pair.pixel - row_of_batch * Index(p.out_width));
    const int row = int(row_of_batch - image * Index(p.out_height));
    const int points = kPoints ? kPoints : cut.points;
    offset = static_cast<const T*>(p.offset) + (pair.pixel * Index(p.offset_stride) + pair.group * Index(points * 2));
    x = origin_of<A>(column, kPoints ? 3 : p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, scale);
    y = origin_of<A>(row, kPoints ? 3 : p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, scale);
  }

  // Of the point of step s.
  __device__ void axes(const Share<kPoints>& share, int s, Axis<A>* horizontal, Axis<A>* vertical) const {
    int row, column;
    point_of(s, kPoints ? 3 : problem.kernel_h, kPoints ? 3 : problem.kernel_w, !kPoints && problem.remove_center,
             &row, &column);
    if (share.upper) row = 2 - row, column = 2 - column;
    constexpr int together = kPoints ? 2 : 1;
    A by[2];
#pragma unroll
    for (int i = 0; i < 2; i += together) widen(load<together>(offset + 2 * share.point(s) + i), by + i);
    const A across = A(column) * A(problem.dilation_w), down = A(row) * A(problem.dilation_h);
    const int width = int(problem.width), height = int(problem.height);
    *horizontal = axis_of(position_of(x, across, by[0], scale), width, kPoints ? 1 : next_pixel(width));
    *vertical = axis_of(position_of(y, down, by[1], scale), height, kPoints ? 1 : next_pixel(height));
  }
};

// The masks of a thread's points, by step, after the softmax where there is one.
template <typename T, int kPoints>
struct Masks {
  using A = Accumulator<T>;
  const T* from;
  bool softmax;
  A highest, factor;
  A kept[kPoints ? Share<kPoints>::kSteps : 1];

  __device__ Masks(const T* masks, const Share<kPoints>& share, bool logits) : from(masks), softmax(logits) {
    if (kPoints) {
#pragma unroll
      for (int s = 0; s < share.steps(); ++s) kept[s] = widen(from[share.point(s)]);
    }
    if (!softmax) return;
    highest = given(0);
#pragma unroll
    for (int s = 1; s < share.steps(); ++s) highest = given(s) > highest ? given(s) : highest;
    if (kPoints) {
      const A other = __shfl_xor_sync(~0u, highest, Share<kPoints>::kPairsOfWarp);
      highest = other > highest ? other : highest;
    }
    A sum = 0;
#pragma unroll
    for (int s = 0; s < share.steps(); ++s) {
      const A power = power_of(given(s) - highest);
      if (kPoints) kept[s] = power;
      sum += share.has(s) ? power : A(0);
    }
    factor = A(1) / share.sum(sum);
  }
  __device__ A at(int s) const {
    if (!softmax) return given(s);
    return (kPoints ? kept[s] : power_of(given(s) - highest)) * factor;
  }
  // Before the softmax. With unrolled points the powers take its place.
  __device__ A given(int s) const { return kPoints ? kept[s] : A(widen(from[s])); }
  static __device__ A power_of(A x) {
    if constexpr (sizeof(T) == 2) return rough_exp_of(x);
    return exp_of(x);
  }
};

// Shared memory of a block: arrays [points][stride], of which `pairs` are used. Neighbouring threads meet in
// no bank, whether they take neighbouring pairs of a point or, with the odd stride of the version for 3x3
// points, neighbouring points of a pair: eight threads read 16 bytes each at once.
template <typename A>
struct alignas(16) Corners {
  A weight[4];  // times the mask: (low y, low x), (low, high), (high, low), (high, high)
};
// kMasks: only the backward pass keeps them. The forward pass keeps where both columns of corners lie, the one to be
// loaded first being first, with its weights.
template <typename A, int kPoints, typename Index, bool kMasks>
struct Shared {
  using Place = Pack<Index, kMasks ? 1 : 2>;
  const int points, stride;
  Corners<A>* const corners;
  A* const masks;
  Place* const places;  // the input's pixel of the batch at the low corner, and at the one beside it
  static constexpr int kPointBytes = int(sizeof(Corners<A>) + sizeof(Place) + (kMasks ? sizeof(A) : 0));
  static constexpr int kStride = kPairs + 1;  // of the version for 3x3 points
  // An even number of masks: places of 8 bytes begin at a border of theirs.
  static constexpr DCNV3_INLINE int64_t masks_of(int64_t count) { return kMasks ? (count + 1) / 2 * 2 : 0; }
  static constexpr int64_t bytes(int64_t count) {
    return count * int64_t(sizeof(Corners<A>) + sizeof(Place)) + masks_of(count) * int64_t(sizeof(A));
  }
  static int64_t bytes(const Cut& cut) { return bytes(kPoints ? kPoints * kStride : cut.points * cut.pairs); }
  __device__ Shared(void* memory, const Cut& cut)
      : points(kPoints ? kPoints : cut.points), stride(kPoints ? kStride : cut.pairs),
        corners(static_cast<Corners<A>*>(memory)), masks(reinterpret_cast<A*>(corners + points * stride)),
        places(reinterpret_cast<Place*>(masks + masks_of(points * stride))) {}
  __device__ int at(int k, int i) const { return k * stride + i; }  // point k of pair i
};

// In an input of one row or column there are no high corners, and no mask, NaN or infinite, makes them any.
template <typename A>
DCNV3_INLINE Corners<A> corners_of(const Axis<A>& h, const Axis<A>& v, A mask) {
  const A low = v.low_weight * mask, high = v.high_weight * mask;
  const bool right = h.high > h.low, below = v.high > v.low;
  return {{low * h.low_weight, right ? low * h.high_weight : A(0), below ? high * h.low_weight : A(0),
           right && below ? high * h.high_weight : A(0)}};
}

// The first step: the points of a span's pairs. Pixels: a Span, or whatever else pair_of takes.
template <typename T, typename Pixels, int kPoints, typename Index, bool kMasks>
__device__ inline void locate(const Problem& p, const Cut& cut, const Pixels& span,
                              const Shared<Accumulator<T>, kPoints, Index, kMasks>& shared) {
  using A = Accumulator<T>;
  const Share<kPoints> share(shared.points);
  for (int i = share.first_pair(); i < kPairs; i += share.kItems) {
    Pair<Index> pair = pair_of(cut, span, i);
    const bool used = i < cut.pairs, valid = used && pair.valid;
    if (!valid) pair = pair_of(cut, span, 0);  // which there always is: the thread goes along
    const Points<T, kPoints, Index> at(p, cut, pair);
    const Index first_mask = pair.pixel * Index(p.mask_stride) + pair.group * Index(shared.points);
    const Masks<T, kPoints> masks(static_cast<const T*>(p.mask) + first_mask, share, p.softmax);
    const Index first_row = at.image * Index(p.height);
#pragma unroll
    for (int s = 0; s < share.steps(); ++s) {
      if (!used || !share.has(s)) continue;
      Axis<A> h, v;
      at.axes(share, s, &h, &v);
      const A mask = masks.at(s);
      const int to = shared.at(share.point(s), i);
      const Corners<A> corners = corners_of(h, v, mask);
      const Index place = valid ? (first_row + Index(v.low)) * Index(p.width) + Index(h.low) : 0;  // may be read
      if constexpr (kMasks) {
        shared.corners[to] = corners, shared.places[to] = {{place}}, shared.masks[to] = mask;
      } else {
        const auto& w = corners.weight;
        const Index beside = place + Index(h.high - h.low);
        const bool swapped = kPoints && ((place * Index(p.group) + pair.group) ^ Index(i)) & cut.other_column;
        shared.corners[to] = swapped ? Corners<A>{{w[1], w[0], w[3], w[2]}} : corners;
        shared.places[to] = {{swapped ? beside : place, swapped ? place : beside}};
      }
    }
  }
}

// How far the corners lie from the low one, in elements: in an input of one row or column, nowhere.
template <typename Index>
struct Distances {
  Index corner[4];
  __device__ explicit Distances(const Problem& p) {
    const Index all = Index(p.group * p.channels);
    const Index right = p.width > 1 ? all : Index(0), below = p.height > 1 ? Index(p.width) * all : Index(0);
    corner[0] = 0, corner[1] = right, corner[2] = below, corner[3] = below + right;
  }
};

// Where the four corners lie if the low one lies at `begin`.
template <typename P>
struct CornerPointers {
  P* to[4];
  template <typename Index>
  __device__ CornerPointers(P* begin, const Distances<Index>& far) {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[q] = hidden(begin + far.corner[q]);
  }
};

template <typename Arguments>
const char* launch(void (*kernel)(Arguments), Arguments arguments, int64_t blocks, int64_t shared, void* stream) {
  if (blocks >= int64_t(1) << 31) return "an image has too many output pixels for one launch";
  void* list[] = {&arguments};
  cudaError_t error = cudaSuccess;
  if (shared > kSharedBytes)
    error = cudaFuncSetAttribute(DCNV3_ENTRY(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess)
    error = cudaLaunchKernel(DCNV3_ENTRY(kernel), dim3(unsigned(blocks)), dim3(kThreads), list, size_t(shared),
                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: not once more by whoever asks next
  return cudaGetErrorString(error);
}

const char* const kTooManyPoints = "the kernel has too many points for the CUDA kernels (about 900 fit)";

}  // namespace
}  // namespace dcnv3
