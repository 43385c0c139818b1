// The backward pass of bfloat16 and float16 by dense products; cuda_backward.h says how the kernels differ. Where a
// group has 16 or 32 channels, as in all of InternImage, these kernels stand for the owning and the tiled one.
//
// A strip is up to 64 output pixels of a group, a row each; a window up to 256 input pixels, a column each: of the
// owning kernel the image, which it goes through in strips, of the tiled one the 16x16 pixels around its 8x8.
// One matrix in shared memory holds first the dot products of every row's output gradient with every column's input,
// then the rows of weights W. Three steps of a strip are products of a warp on tensor cores:
//   dots = grad_output input^T, in 16 bits;    grad_input += W^T grad_output, in tf32.
// In tf32 W has 11 bits: of float16, two parts; of bfloat16, whose numbers have 8, one, rounded.
// Between them two threads of a warp have a row for themselves: they find its points, read their dot products, and add
// their weights, without a barrier and without atomic adds. The sparse kernels do that for 36 corners a row times the
// channels.
//
// All that a strip reads from memory is asked for before the first of it is used: a multiprocessor has 8 to 16 warps of
// these kernels, too few to hide several waits after each other.
//
// In a product everything meets everything. A corner of weight 0 must get nothing of an infinite gradient all the
// same: a strip with a number that is not finite is multiplied number by number, skipping zeros.
#include <type_traits>

#include "cuda_backward.h"
#ifndef DCNV3_EMULATED
#include "cuda_products.h"
#endif

namespace dcnv3 {
namespace {

constexpr int kColumns = 256;  // of a window, at most
constexpr int kWarps = kThreads / 32;
constexpr int kTilesOfWarp = kColumns / 16 / kWarps;  // of 16 columns: all sums stay in registers
// The tiled kernel's rows in two parts: those of the tile's upper four rows see the upper 12 rows of the window, those
// of its lower four the lower 12, all with three rows to spare. So a multiprocessor of an H100 has room for four
// blocks.
template <bool kOwns>
struct Parts {
  static constexpr int count = kOwns ? 1 : 2, shift = 4;  // by so many rows of the window the second part begins lower
  static constexpr int window_h = kWindow - (count - 1) * shift;
  static constexpr int columns = kColumns - (count - 1) * shift * kWindow, stride = columns + 8;
  static DCNV3_INLINE int of_row(int row) { return kOwns ? 0 : row / (kPairs / 2); }
  static DCNV3_INLINE int end(int part, int rows) { return kOwns ? rows : (part + 1) * (kPairs / 2); }
};
constexpr int kRowsOfRound = kThreads / 9, kRounds = (kPairs + kRowsOfRound - 1) / kRowsOfRound;  // of for_points

struct Dense {
  Problem problem;  // grad_input: of type T where a block owns it, otherwise the sums
  Cut cut;          // one group a block
  Tiling tiling;
  int rows, stride;  // of the matrix: a multiple of 8; floats from one row to the next
  int window_w;
  int64_t bytes;  // of a Strip
};

template <typename T, int kChannels, bool kOwns>
struct Strip {
  float* const matrix;  // [rows][stride]
  T* const grads;       // [kPairs][kChannels], of rows without a pair 0
  T* const offsets;     // [rows][9][2], then their gradients
  T* const masks;       // [rows][9], then their gradients
  const int stride;
  __device__ Strip(void* memory, const Dense& a)
      : matrix(static_cast<float*>(memory)), grads(reinterpret_cast<T*>(matrix + a.rows * a.stride)),
        offsets(grads + kPairs * kChannels), masks(offsets + a.rows * 18),
        stride(kOwns ? a.stride : Parts<kOwns>::stride) {}
};

// Whether one of two 16-bit numbers is infinite or NaN: one more in a full exponent carries into the sign.
DCNV3_INLINE uint32_t not_finite(uint32_t two, BFloat16) { return ((two & 0x7f807f80u) + 0x00800080u) & 0x80008000u; }
DCNV3_INLINE uint32_t not_finite(uint32_t two, Float16) { return ((two & 0x7c007c00u) + 0x04000400u) & 0x80008000u; }

__device__ inline void add_product_of(BFloat16, float* sums, const uint32_t* a, const uint32_t* b) {
  add_product_bfloat(sums, a, b);
}
__device__ inline void add_product_of(Float16, float* sums, const uint32_t* a, const uint32_t* b) {
  add_product_half(sums, a, b);
}

// The channels of thread t = lane % 4 in a product's result, columns 2t and 2t + 1 of its kChannels / 8 tiles: those
// of a column are neighbours. Four neighbouring threads have neighbouring ones where a thread stores or adds them all
// at once; where one at a time, two times four in one sector of memory each.
template <int kChannels, bool together>
DCNV3_INLINE int channels_of(int column) {
  return (together ? column : column % 2 * 4 + column / 2) * (kChannels / 8);
}

// The rows of a block that owns an image's group, in place of a Span.
struct Rows {
  uint32_t first, end, group;
};
__device__ inline Pair<uint32_t> pair_of(const Cut&, const Rows& rows, uint32_t i) {
  return {rows.first + i < rows.end, rows.first + i, rows.group};
}

// Neighbouring threads take neighbouring points, always the k-th of a row: each(round, row, k).
template <typename Each>
__device__ inline void for_points(const Each& each) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int i = round * kRowsOfRound + int(threadIdx.x) / 9;
    if (threadIdx.x < kRowsOfRound * 9 && i < kPairs) each(round, i, int(threadIdx.x) % 9);
  }
}

// The window: the image's first pixel of the batch, and the window's first row and column.
struct Window {
  uint32_t image;
  int top, left;
};
// The pixels of a column of the matrix and of every 32nd after it. The owning kernel counts both alike.
template <bool kOwns>
struct Columns {
  const Problem& p;
  int y, x;
  uint32_t pixel, step;  // of the batch; from one to the next
  __device__ Columns(const Problem& problem, const Window& window, int column) : p(problem) {
    y = kOwns ? 0 : window.top + column / kWindow, x = kOwns ? column : window.left + column % kWindow;
    pixel = window.image + uint32_t(y * int(p.width) + x);
    step = kOwns ? 32 : 32 / kWindow * uint32_t(p.width);
  }
  __device__ bool exists(int n) const {  // may be beyond the image
    if (kOwns) return x + 32 * n < int(p.height * p.width);
    return uint32_t(y + 32 / kWindow * n) < uint32_t(p.height) && uint32_t(x) < uint32_t(p.width);
  }
};

// What a thread loads of a strip; of the window, a quarter of the channels of every 32nd column's pixel.
template <typename T, int kChannels, bool kOwns>
struct Loaded {
  static constexpr int size = kVectorBytes / sizeof(T), vectors = kChannels / size, words = kChannels / 8;
  Pack<uint32_t, 4> grads[kPairs * vectors / kThreads];
  Pack<T, 2> offsets[kRounds];
  T masks[kRounds];
  Pack<uint32_t, words> input[kColumns / 32];

  template <typename Pixels>
  __device__ void load_rows(const Dense& a, const Pixels& span) {
    const Problem& p = a.problem;
#pragma unroll
    for (int j = 0; j < kPairs * vectors / kThreads; ++j) {
      const int item = j * kThreads + threadIdx.x;
      const Pair<uint32_t> pair = pair_of(a.cut, span, item / vectors);
      grads[j] = {};
      if (pair.valid)
        grads[j] = bits_as<Pack<uint32_t, 4>>(load<size>(static_cast<const T*>(p.grad_output) + first_channel(p, pair) +
                                                         item % vectors * size));
    }
    for_points([&](int round, int i, int k) {
      const Pair<uint32_t> pair = pair_of(a.cut, span, i);
      const uint32_t of_pixel = pair.group * 9 + k;
      offsets[round] = {}, masks[round] = {};
      if (!pair.valid) return;
      offsets[round] =
          load<2>(static_cast<const T*>(p.offset) + (pair.pixel * uint32_t(p.offset_stride) + 2 * of_pixel));
      masks[round] = static_cast<const T*>(p.mask)[pair.pixel * uint32_t(p.mask_stride) + of_pixel];
    });
  }

  __device__ void load_window(const Dense& a, const Window& window, uint32_t group) {
    const Problem& p = a.problem;
    const Columns<kOwns> columns(p, window, threadIdx.x / 4);
    const uint32_t from = (columns.pixel * uint32_t(p.group) + group) * (kChannels / 2) + threadIdx.x % 4 * words;
    const uint32_t step = columns.step * uint32_t(p.group) * (kChannels / 2);
#pragma unroll
    for (int n = 0; n < kColumns / 32; ++n) {
      const uint32_t at = columns.exists(n) ? from + n * step : 0;  // no point has a corner there: any pixel will do
      input[n] = load<words>(static_cast<const uint32_t*>(p.input) + at);
    }
  }

  // Whether this thread has seen a number that is not finite.
  __device__ bool store_to(const Dense& a, const Strip<T, kChannels, kOwns>& strip) const {
    for_points([&](int round, int i, int k) {
      if (i >= a.rows) return;
      reinterpret_cast<Pack<T, 2>*>(strip.offsets)[i * 9 + k] = offsets[round];
      strip.masks[i * 9 + k] = masks[round];
    });
    uint32_t bad = 0;
#pragma unroll
    for (int j = 0; j < kPairs * vectors / kThreads; ++j) {
#pragma unroll
      for (int word = 0; word < 4; ++word) bad |= not_finite(grads[j].numbers[word], T());
      reinterpret_cast<Pack<uint32_t, 4>*>(strip.grads)[j * kThreads + threadIdx.x] = grads[j];
    }
    return bad;
  }
};

// All dot products of a strip with the window. A warp takes every fourth eight columns.
template <typename T, int kChannels, bool kOwns>
__device__ inline void multiply_rows(const Dense& a, const Strip<T, kChannels, kOwns>& strip,
                                     const Loaded<T, kChannels, kOwns>& loaded) {
  using In = Parts<kOwns>;
  constexpr int words = kChannels / 8, between = In::shift * kWindow / 32;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int eights = strip.stride / 8 - warp;  // of this warp, times kWarps
#pragma unroll
  for (int part = 0; part < In::count; ++part) {
#pragma unroll 1
    for (int next = part * kPairs / 2; next < In::end(part, a.rows); next += 16) {
      const int row = kOwns ? smaller_of(next, a.rows - 16) : next;  // the last eight perhaps a second time
      uint32_t grads[words][2];
#pragma unroll
      for (int i = 0; i < words; ++i) {  // word by word: of two at once the compiler makes a copy for every product
#pragma unroll
        for (int h = 0; h < 2; ++h)
          grads[i][h] = reinterpret_cast<const uint32_t*>(strip.grads + (row + g + 8 * h) * kChannels)[t * words + i];
      }
      float* const to = strip.matrix + (row + g) * strip.stride + warp * 8 + 2 * t;
      float* const below = to + 8 * strip.stride;
#pragma unroll
      for (int n = 0; n < In::columns / 32; ++n) {
        float dots[4] = {};
#pragma unroll
        for (int i = 0; i < words; i += 2)
          add_product_of(T(), dots, grads[i], loaded.input[n + part * between].numbers + i);
        if (kOwns && n * kWarps >= eights) continue;
        *reinterpret_cast<Pack<float, 2>*>(to + n * kWarps * 8) = {{dots[0], dots[1]}};
        *reinterpret_cast<Pack<float, 2>*>(below + n * kWarps * 8) = {{dots[2], dots[3]}};
      }
    }
  }
}

// A point that the window does not hold is taken by the thread's whole warp: half of it a row of two corners, a thread
// every 16th channel. Adds to memory what `mine` points give to the input's gradient, and sets their dot products.
// place: of the low corner among all pixels of the batch. grads: the output gradients of the warp's 16 rows.
template <typename T, int kChannels>
__device__ inline void take_outside(const Problem& p, bool mine, const Corners<float>& corners, uint32_t place,
                                    uint32_t group, const T* grads, float* dots) {
  const int lane = threadIdx.x % 32, half = lane / 16;
  for (unsigned left = __ballot_sync(~0u, mine); left; left &= left - 1) {
    const int owner = __ffs(int(left)) - 1;
    const uint32_t from = __shfl_sync(~0u, place, owner) + uint32_t(half * p.width);
    float weights[2], sums[2] = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float low = __shfl_sync(~0u, corners.weight[q], owner);
      const float high = __shfl_sync(~0u, corners.weight[q + 2], owner);
      weights[q] = half ? high : low;
    }
#pragma unroll
    for (int c = lane % 16; c < kChannels; c += 16) {
      const float grad = widen(grads[owner % 16 * kChannels + c]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const uint32_t at = ((from + q) * uint32_t(p.group) + group) * kChannels + c;
        sums[q] += grad * widen(static_cast<const T*>(p.input)[at]);
        if (weights[q] != 0) atomicAdd(static_cast<float*>(p.grad_input) + at, grad * weights[q]);
      }
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
#pragma unroll
      for (int q = 0; q < 2; ++q) sums[q] += __shfl_xor_sync(~0u, sums[q], step);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float dot = __shfl_sync(~0u, sums[q % 2], q / 2 * 16);
      if (lane == owner) dots[q] = dot;
    }
  }
}

// Two threads a row: gradients of offsets and masks from the dot products, whose place its row of W takes. Whether a
// mask is not finite.
template <typename T, int kChannels, bool kOwns, typename Pixels>
__device__ inline bool combine_and_weigh(const Dense& a, const Window& window, const Pixels& span,
                                         const Strip<T, kChannels, kOwns>& strip) {
  const Problem& p = a.problem;
  const Share<9> share(9);
  constexpr int steps = 5, other = Share<9>::kPairsOfWarp;
  // All warps have as many rows. Beyond its last one threads go along: what they read no other warp writes meanwhile.
  const int rows = kOwns ? a.rows / kWarps : other, number = threadIdx.x % other;
  const int i = threadIdx.x / 32 * rows + smaller_of(number, rows - 1);
  const Pair<uint32_t> pair = pair_of(a.cut, span, i);
  const bool mine = number < rows, valid = mine && pair.valid;
  float* const row = strip.matrix + i * strip.stride;
  const int top = window.top + Parts<kOwns>::of_row(i) * Parts<kOwns>::shift;
  T *const offsets = strip.offsets + i * 18, *const to_masks = strip.masks + i * 9;
  Points<T, 9, uint32_t> at(p, a.cut, pair);
  at.offset = offsets;
  const Masks<T, 9> masks(to_masks, share, p.softmax);
  Corners<float> corners[steps];
  int places[steps];  // the column of the low corner, or -1
  Pack<T, 2> moves[steps];
  float by_mask[steps], mean = 0;
  bool bad = false;
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    Axis<float> h, v;
    at.axes(share, s, &h, &v);
    const float mask = masks.at(s);
    bad = bad || !(magnitude_of(mask) < INFINITY);
    corners[s] = corners_of(h, v, mask);
    const int y = v.low - top, x = h.low - window.left;
    const bool inside = kOwns || (y >= 0 && y < Parts<kOwns>::window_h - 1 && x >= 0 && x < kWindow - 1);
    float dots[4] = {};
    places[s] = inside && valid && share.has(s) ? y * a.window_w + x : -1;
    if (inside) {
#pragma unroll
      for (int q = 0; q < 4; ++q) dots[q] = row[y * a.window_w + x + q / 2 * a.window_w + q % 2];
    }
    if (!kOwns) {
      const uint32_t pixel = window.image + uint32_t(v.low) * uint32_t(p.width) + uint32_t(h.low);
      take_outside<T, kChannels>(p, !inside && valid && share.has(s), corners[s], pixel, pair.group,
                                 strip.grads + i / other * other * kChannels, dots);
    }
    const Corners<float> gradient = gradients_of(h, v, dots, mask * float(p.offset_scale));
    narrow(gradient.weight[0], &moves[s].numbers[0]), narrow(gradient.weight[1], &moves[s].numbers[1]);
    by_mask[s] = gradient.weight[2];
    mean += share.has(s) ? mask * by_mask[s] : 0;
  }
  mean = share.sum(mean);
  __syncwarp();  // all dot products are read
  if (mine) {
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      if (!share.has(s)) continue;
      const int k = share.point(s);
      reinterpret_cast<Pack<T, 2>*>(offsets)[k] = moves[s];
      narrow(p.softmax ? masks.at(s) * (by_mask[s] - mean) : by_mask[s], to_masks + k);
    }
    // Rows lie an odd number of eights apart: every other four threads begin with the second four, in other banks.
#pragma unroll 4
    for (int c = share.upper ? 8 : 0; c < strip.stride; c += 16) {
      *reinterpret_cast<Pack<float, 4>*>(row + (i & 4) + c) = {};
      *reinterpret_cast<Pack<float, 4>*>(row + (~i & 4) + c) = {};
    }
  }
  __syncwarp();
  // Both threads add every point, one its upper two corners, the other its lower two.
  float* const part = row + (share.upper ? a.window_w : 0);
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    const auto& weight = corners[s].weight;
    const int place[2] = {places[s], __shfl_xor_sync(~0u, places[s], other)};
    float left[2] = {share.upper ? weight[2] : weight[0], share.upper ? weight[0] : weight[2]};
    float right[2] = {share.upper ? weight[3] : weight[1], share.upper ? weight[1] : weight[3]};
    left[1] = __shfl_xor_sync(~0u, left[1], other), right[1] = __shfl_xor_sync(~0u, right[1], other);
#pragma unroll
    for (int turn = 0; turn < (s == steps - 1 ? 1 : 2); ++turn) {
      const bool own = share.upper == (turn == 1);
      const int column = own ? place[0] : place[1];
      float* const to = part + column;
      if (column >= 0) to[0] += own ? left[0] : left[1], to[1] += own ? right[0] : right[1];
      __syncwarp();
    }
  }
  return bad && valid;
}

// The columns of a thread in a tile of the sums: 16 * tile + 2 * (lane / 4) and the next one. Of both the channels of
// columns 2t and 2t + 1, each n: sums[tile of the warp][n][2 * which + t's column].
template <int kChannels>
using Sums = float[kTilesOfWarp][kChannels / 8][4];

// sums += W^T grads.
template <bool together, typename T, int kChannels, bool kOwns>
__device__ inline void add_columns(const Dense& a, const Strip<T, kChannels, kOwns>& strip, bool finite,
                                   Sums<kChannels>& sums) {
  using In = Parts<kOwns>;
  constexpr int n_tiles = kChannels / 8, tiles = In::columns / 16 / kWarps;
  constexpr bool one_part = std::is_same<T, BFloat16>::value;
  static_assert(In::shift * kWindow == 16 * kWarps, "the next part's first tile of a warp is this one's second");
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < In::count; ++part) {
    const int first = part * kPairs / 2, end = In::end(part, a.rows);
    if (!finite) {
#pragma unroll 1
      for (int row = first; row < end; ++row) {
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
#pragma unroll
          for (int j = 0; j < 8 * n_tiles / 2; ++j) {
            const int which = j / (2 * n_tiles), column = j / n_tiles % 2, n = j % n_tiles;
            const int to = warp * 16 + m * 16 * kWarps + 2 * g + which;
            if (to >= strip.stride) continue;
            const float weight = strip.matrix[row * strip.stride + to];
            const float grad =
                widen(strip.grads[row * kChannels + channels_of<kChannels, together>(2 * t + column) + n]);
            if (weight != 0) sums[m + part][n][2 * which + column] += weight * grad;
          }
        }
      }
      continue;
    }
    const float* low = strip.matrix + (first + t) * strip.stride + warp * 16 + 2 * g;
    const T* from = strip.grads + (first + t) * kChannels + channels_of<kChannels, together>(g);
#pragma unroll 2
    for (int row = first; row < end; row += 8, low += 8 * strip.stride, from += 8 * kChannels) {
      float grads[n_tiles][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float numbers[n_tiles];
        widen(load<n_tiles>(from + 4 * h * kChannels), numbers);
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) grads[n][h] = numbers[n];
      }
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        // Reading on into the next row would do no harm, but cost time.
        if (kOwns && m % 2 && warp * 16 + m * 16 * kWarps >= strip.stride) break;
        float high[4], rest[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Pack<float, 2> weights = load<2>(low + 4 * h * strip.stride + m * 16 * kWarps);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t bits = bits_as<uint32_t>(weights.numbers[j]) + (one_part ? 0x1000u : 0);  // rounded
            high[2 * h + j] = bits_as<float>(bits & 0xffffe000u);
            rest[2 * h + j] = weights.numbers[j] - high[2 * h + j];
          }
        }
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) add_product_tf32(sums[m + part][n], high, grads[n]);
#pragma unroll
        for (int n = 0; n < n_tiles && !one_part; ++n) add_product_tf32(sums[m + part][n], rest, grads[n]);
      }
    }
  }
}

// Writes the gradients of offsets and masks, neighbouring threads to neighbouring numbers.
template <typename T, int kChannels, bool kOwns, typename Pixels>
__device__ inline void put(const Dense& a, const Pixels& span, const Strip<T, kChannels, kOwns>& strip) {
  const Problem& p = a.problem;
  for_points([&](int, int i, int k) {
    const Pair<uint32_t> pair = pair_of(a.cut, span, i);
    if (!pair.valid) return;
    const uint32_t to = (pair.pixel * uint32_t(p.group) + pair.group) * 9 + k;
    static_cast<Pack<T, 2>*>(p.grad_offset)[to] = reinterpret_cast<const Pack<T, 2>*>(strip.offsets)[i * 9 + k];
    static_cast<T*>(p.grad_mask)[to] = strip.masks[i * 9 + k];
  });
}

// Calls each(pixel of the batch, t, the sums of columns 2t and 2t + 1) for the pixels of a thread's sums.
template <bool kOwns, int kChannels, typename Each>
__device__ inline void for_sums(const Dense& a, const Window& window, const Sums<kChannels>& sums, const Each& each) {
  constexpr int n_tiles = kChannels / 8;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const Columns<kOwns> columns(a.problem, window, warp * 16 + 2 * g + which);
#pragma unroll
    for (int m = 0; m < kTilesOfWarp; ++m) {
      if (!columns.exists(2 * m)) continue;
      float numbers[2 * n_tiles];
#pragma unroll
      for (int j = 0; j < 2 * n_tiles; ++j) numbers[j] = sums[m][j % n_tiles][2 * which + j / n_tiles];
      each(columns.pixel + 2 * m * columns.step, t, numbers);
    }
  }
}

// Blocks of a multiprocessor at once.
template <int kChannels>
constexpr int kDenseBlocks = kChannels > 16 ? 2 : 4;

template <typename T, int kChannels, bool kOwns>
__global__ void __launch_bounds__(kThreads, kDenseBlocks<kChannels>) dense_kernel(Dense a) {
  const Problem& p = a.problem;
  DCNV3_SHARED(memory);
  const Strip<T, kChannels, kOwns> strip(memory, a);
  constexpr bool together = kOwns || kAtomicVector == 4;
  Sums<kChannels> sums = {};
  Loaded<T, kChannels, kOwns> loaded;
  // A strip that is loaded; `next` loads another one meanwhile.
  const auto run = [&](const auto& span, const Window& window, const auto& next) {
    loaded.load_window(a, window, span.group);
    bool bad = loaded.store_to(a, strip);
    __syncthreads();
    multiply_rows(a, strip, loaded);
    __syncthreads();
    bad = combine_and_weigh(a, window, span, strip) || bad;
    bad = __syncthreads_or(bad);
    next();
    add_columns<together>(a, strip, !bad, sums);
    put(a, span, strip);
  };
  if constexpr (kOwns) {
    const uint32_t image = a.tiling.groups.quotient(blockIdx.x), group = blockIdx.x - image * a.tiling.groups.value;
    const uint32_t first = image * uint32_t(p.out_height * p.out_width), pairs = uint32_t(a.cut.pairs);
    const uint32_t end = first + uint32_t(p.out_height * p.out_width);
    const Window window{image * uint32_t(p.height * p.width), 0, 0};
    const auto rows = [&](uint32_t begin) { return Rows{begin, smaller_of(begin + pairs, end), group}; };
    loaded.load_rows(a, rows(first));
    for (uint32_t begin = first; begin < end; begin += pairs) {
      if (begin > first) __syncthreads();
      run(rows(begin), window, [&] {
        if (begin + pairs < end) loaded.load_rows(a, rows(begin + pairs));
      });
    }
    for_sums<kOwns, kChannels>(a, window, sums, [&](uint32_t pixel, int t, const float* numbers) {
      constexpr int size = kChannels / 4;
      Pack<T, size> result;
#pragma unroll
      for (int j = 0; j < size; ++j) narrow(numbers[j], &result.numbers[j]);
      static_cast<Pack<T, size>*>(p.grad_input)[(pixel * uint32_t(p.group) + group) * 4 + t] = result;
    });
  } else {
    const Tile<uint32_t> tile = tile_of<uint32_t>(a.tiling, blockIdx.x);
    const Window window{tile.image * uint32_t(p.height * p.width),
                        window_of(tile.row, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h),
                        window_of(tile.column, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w)};
    loaded.load_rows(a, tile);
    run(tile, window, [] {});
    for_sums<kOwns, kChannels>(a, window, sums, [&](uint32_t pixel, int t, const float* numbers) {
      float* const to = static_cast<float*>(p.grad_input) + (pixel * uint32_t(p.group) + tile.group) * kChannels;
      constexpr int size = together ? kAtomicVector : 1;
#pragma unroll
      for (int j = 0; j < kChannels / 4; j += size) {
        bool some = false;  // most pixels at the window's border get nothing
#pragma unroll
        for (int m = 0; m < size; ++m) some = some || numbers[j + m] != 0;
        constexpr int of_column = kChannels / 8;
        const int channel = channels_of<kChannels, together>(2 * t + j / of_column) + j % of_column;
        if (some) add_to<size>(to + channel, numbers + j);
      }
    });
  }
}

Dense dense_of(const Problem& p, bool owns) {
  Dense a{p, cut_of(p, 8, 1, 1), Tiling(p), 0, 0, owns ? int(p.width) : kWindow, 0};
  if (owns) {  // strips of like length: four of 49 pixels in an image of 14x14
    const int64_t pixels = p.out_height * p.out_width, strips = (pixels + kPairs - 1) / kPairs;
    a.cut.pairs = int((pixels + strips - 1) / strips);
  }
  const int eights = owns ? int(p.height * p.width + 7) / 8 : Parts<false>::columns / 8;
  a.rows = larger_of((a.cut.pairs + 7) / 8 * 8, 16);
  a.stride = 8 * (eights + (eights + 1) % 2);  // of an odd number of eights: threads meet in no bank
  a.bytes = int64_t(a.rows) * a.stride * sizeof(float) + (kPairs * p.channels + a.rows * 27) * 2;
  return a;
}

template <typename T, int kChannels>
const char* start(const Problem& p, bool owns, void* stream) {
  const Dense a = dense_of(p, owns);
  if (owns) return launch(dense_kernel<T, kChannels, true>, a, p.batch * p.group, a.bytes, stream);
  return launch(dense_kernel<T, kChannels, false>, a, a.tiling.blocks, a.bytes, stream);
}

}  // namespace

// With one block a multiprocessor would wait for memory most of the time.
bool dense_fits(const Problem& p, bool owns) {
  const void* tensors[] = {p.input, p.grad_output};
  return (p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16) && (p.channels == 16 || p.channels == 32) &&
         fits_vectors(p, 8, 2, tensors, 2) && elements_of_an_image(p) <= kReach &&
         (!owns || p.height * p.width <= kColumns) && device().major >= 8 &&
         2 * (dense_of(p, owns).bytes + kReserved) <= device().shared_bytes;
}

const char* dense_backward(const Problem& p, bool owns, void* stream) {
  if (p.dtype == Dtype::bfloat16)
    return p.channels == 16 ? start<BFloat16, 16>(p, owns, stream) : start<BFloat16, 32>(p, owns, stream);
  return p.channels == 16 ? start<Float16, 16>(p, owns, stream) : start<Float16, 32>(p, owns, stream);
}

}  // namespace dcnv3
