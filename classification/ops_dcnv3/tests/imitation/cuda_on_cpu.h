// Just enough of CUDA to run the kernels' own source on a CPU, where no GPU is: every thread of a block
// is a fiber, and barriers and shuffles hand over to the next one. It shows whether indices, guards and
// sums are right, and under ThreadSanitizer whether threads of a block meet in memory between barriers; nothing about
// speed, and nothing about races between blocks. Threads go in order, a warp at
// a time; with DCNV3_TEST_SHUFFLE=seed, blocks and the threads of a block go in an order drawn anew at every
// barrier, so that what depends on the order without a barrier shows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define DCNV3_EMULATED
#define __global__
#define __device__
#define __launch_bounds__(...)
#define DCNV3_ENTRY(kernel) kernel
#define DCNV3_SHARED(name) Wide* const name = reinterpret_cast<Wide*>(emulated::shared)

// A GPU's own instructions (csrc/cuda_instructions.h), from what they are said to do.
namespace dcnv3 {
namespace {
inline float float_of_half_bits(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? ldexpf(float(1024 + fraction), exponent - 25)
                                    : ldexpf(float(fraction), -24);
  return bits >> 15 ? -size : size;
}
// The nearest number of `fraction` bits behind the first and exponents up to `highest`; ties to even.
inline uint16_t bits_of(float x, int fraction, int highest) {
  const int sign = signbit(x) ? 0x8000 : 0, infinity = (2 * highest + 1) << fraction;
  if (x != x) return 0x7fff;
  if (x == 0 || isinf(x)) return uint16_t(sign | (x == 0 ? 0 : infinity));
  const int exponent = std::max(ilogbf(x), 1 - highest);  // below it numbers are subnormal
  const int64_t units = int64_t(nearbyint(ldexp(fabs(double(x)), fraction - exponent)));
  const int64_t bits = units + (int64_t(exponent + highest - 1) << fraction);  // a first bit adds one to the exponent
  return uint16_t(sign | int(std::min(bits, int64_t(infinity))));
}
inline uint16_t half_bits_of(float x) { return bits_of(x, 10, 15); }
inline uint16_t bfloat_bits_of(float x) { return bits_of(x, 7, 127); }
inline float rough_power_of_two(float x) {
  const float power = exp2f(x) * (1 + 0x1p-22f);
  return power < 0x1p-126f ? 0 : power;
}
template <typename A>
int integer_below(A x) {
  return x != x ? 0 : int(std::min(std::max(double(floor(x)), double(INT32_MIN)), double(INT32_MAX)));
}
}  // namespace
}  // namespace dcnv3

struct alignas(16) Wide {
  double numbers[2];
};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned n = 1) : x(n) {}
};
typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 1, cudaErrorInvalidDeviceFunction = 2,
                      cudaErrorUnsupportedPtxVersion = 3, cudaErrorInsufficientDriver = 4;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
// A GPU that the kernels have no image for, where a test asks for it.
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return getenv("DCNV3_TEST_NO_IMAGE") ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

// More shared memory than a block gets unasked has to be asked for first.
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
namespace emulated {
static const void* asked_for;
static size_t granted;
}  // namespace emulated
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  emulated::asked_for = reinterpret_cast<const void*>(kernel), emulated::granted = size_t(bytes);
  return bytes <= 99 * 1024 ? cudaSuccess : 1;  // what every GPU since sm_80 has
}

// What the kernels ask of a device: an A100, where a test says nothing else.
constexpr int cudaDevAttrComputeCapabilityMajor = 0, cudaDevAttrMaxSharedMemoryPerMultiprocessor = 1;
namespace emulated {
static int attributes[2] = {8, 164 * 1024};
}  // namespace emulated
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = emulated::attributes[attribute];
  return cudaSuccess;
}

static dim3 threadIdx, blockIdx;

// For ThreadSanitizer a thread of the GPU is a fiber, and only barriers put fibers in order: two that meet in memory
// between barriers are reported, whatever came of it. What the imitation does for itself is not watched.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
namespace emulated {
struct Unwatched {
  Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
using Watched = void*;
static void* const launching = __tsan_get_current_fiber();
static std::vector<Watched> watched;
inline void watch(size_t count) {
  while (watched.size() < count) watched.push_back(__tsan_create_fiber(0));
}
inline void now_watch(int thread) {
  __tsan_switch_to_fiber(thread < 0 ? launching : watched[thread], __tsan_switch_to_fiber_no_sync);
}
inline void release(void* meeting) { __tsan_release(meeting); }
inline void acquire(void* meeting) { __tsan_acquire(meeting); }
}  // namespace emulated
#else
namespace emulated {
struct Unwatched {
  ~Unwatched() {}
};
inline void watch(size_t) {}
inline void now_watch(int) {}
inline void release(void*) {}
inline void acquire(void*) {}
}  // namespace emulated
#endif

// A thread of the GPU: a stack of its own, and where it stands on it.
namespace emulated {
#if defined(__x86_64__) && defined(__linux__)
// Only what a function keeps for its caller. (swapcontext asks the system for the signal mask at every change, and
// AddressSanitizer clears its notes on a whole stack there: three times as slow.)
using Fiber = void*;
asm(R"(
.pushsection .text
dcnv3_change_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.popsection
)");
extern "C" void dcnv3_change_fiber(Fiber* from, Fiber to);
inline void change(Fiber& from, Fiber& to) { dcnv3_change_fiber(&from, to); }
inline void begin(Fiber& fiber, char* stack, size_t size, void (*function)()) {
  // Six registers, the function to return to, and its own return address, which it never uses.
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) / 16 * 16) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(function);
  fiber = top;
}
#else
using Fiber = ucontext_t;
inline void change(Fiber& from, Fiber& to) { swapcontext(&from, &to); }
inline void begin(Fiber& fiber, char* stack, size_t size, void (*function)()) {
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stack, fiber.uc_stack.ss_size = size;
  makecontext(&fiber, function, 0);
}
#endif

static char* shared;
static std::vector<Fiber> fibers;
static std::vector<bool> done;
struct Slot {
  double numbers[3];
};
static std::vector<Slot> slots;    // what a thread offers to its warp, in turn by one of two
static long steps;                 // of all fibers together
static Fiber scheduler;

inline void hand_over() {
  Fiber& mine = fibers[threadIdx.x];
  now_watch(-1);
  change(mine, scheduler);
}

// Threads that wait for each other: those that have not ended, how many of them are there, how often all were.
struct Barrier {
  unsigned threads, arrived = 0;
  long turn = 0;
  char meetings[2] = {};  // in turn: a quick thread may have come to the next one
  void open() { arrived = 0, ++turn; }
  void wait(bool orders_memory = true) {
    const Unwatched own;
    ++steps;
    char* const meeting = &meetings[turn % 2];
    if (orders_memory) release(meeting);
    if (++arrived == threads)
      open();
    else
      for (const long mine = turn; turn == mine;) hand_over();
    if (orders_memory) acquire(meeting);
  }
  void leave() {
    if (--threads == arrived && arrived) open();
  }
};
static Barrier block_barrier;
static std::vector<Barrier> warp_barriers;
inline Barrier& warp_barrier() { return warp_barriers[threadIdx.x / 32]; }
}  // namespace emulated

inline void __syncthreads() { emulated::block_barrier.wait(); }
inline void __syncwarp() { emulated::warp_barrier().wait(); }
inline int __syncthreads_or(int value) {
  const emulated::Unwatched own;
  static bool any[2];  // the next barrier may have begun before a slow thread reads
  bool& mine = any[emulated::block_barrier.turn % 2];
  mine = value || (emulated::block_barrier.arrived > 0 && mine);
  __syncthreads();
  return mine;
}
namespace emulated {
// Offers `value` to the warp, and returns by lane what all its threads offer. Two places a thread: a quick one offers
// its next value while a slow one still reads. That it puts no other memory in order is as CUDA says.
template <typename A>
auto exchanged(A value) {
  const long turn = warp_barrier().turn % 2;
  static_assert(sizeof(A) <= sizeof(Slot), "");
  memcpy(&slots[2 * threadIdx.x + turn], &value, sizeof(A));
  warp_barrier().wait(false);
  return [turn](int lane) -> const A& {
    return reinterpret_cast<const A&>(slots[2 * (threadIdx.x / 32 * 32 + lane) + turn]);
  };
}
}  // namespace emulated
template <typename A>
A __shfl_sync(unsigned, A value, int lane) {
  const emulated::Unwatched own;
  return emulated::exchanged(value)(lane);
}
template <typename A>
A __shfl_xor_sync(unsigned all, A value, int mask) {
  return __shfl_sync(all, value, int(threadIdx.x % 32) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const emulated::Unwatched own;
  const auto of = emulated::exchanged(value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(of(lane)) << lane;
  return bits;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Products of a warp (csrc/cuda_products.h): exact, and their sum cut off behind 24 bits, as tensor cores do.
namespace dcnv3 {
namespace {
template <int per, typename Number>  // numbers of a register
void add_product(float* sums, const uint32_t* a, const uint32_t* b, Number number) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const emulated::Unwatched own;
  const auto of = emulated::exchanged(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < 4; ++j) {
    const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
    double sum = sums[j];
    for (int k = 0; k < 8 * per; ++k) {
      const int t = k / per % 4, half = k / per / 4, part = k % per;
      sum += double(number(of(row % 8 * 4 + t).a[row / 8 + 2 * half], part)) * number(of(column * 4 + t).b[half], part);
    }
    sums[j] = float(sum);
    if (fabs(double(sums[j])) > fabs(sum)) sums[j] = nextafterf(sums[j], 0.0f);
  }
}
inline void add_product_tf32(float* sums, const float* a, const float* b) {
  uint32_t of_a[4], of_b[2];
  memcpy(of_a, a, sizeof(of_a)), memcpy(of_b, b, sizeof(of_b));
  add_product<1>(sums, of_a, of_b, [](uint32_t bits, int) {
    float number;
    bits &= 0xffffe000u;
    memcpy(&number, &bits, sizeof(number));
    return number;
  });
}
inline void add_product_half(float* sums, const uint32_t* a, const uint32_t* b) {
  add_product<2>(sums, a, b, [](uint32_t bits, int part) { return float_of_half_bits(uint16_t(bits >> 16 * part)); });
}
inline void add_product_bfloat(float* sums, const uint32_t* a, const uint32_t* b) {
  add_product<2>(sums, a, b, [](uint32_t bits, int part) {
    float number;
    bits = part ? bits & 0xffff0000u : bits << 16;
    memcpy(&number, &bits, sizeof(number));
    return number;
  });
}
}  // namespace
}  // namespace dcnv3
namespace emulated {
static long added;  // numbers, by atomicAdd
}  // namespace emulated
template <typename A>
void atomicAdd(A* to, A value) {
  const emulated::Unwatched own;
  *to += value, ++emulated::added;
}
inline int atomicExch(int* at, int value) {
  const emulated::Unwatched own;
  return std::exchange(*at, value);
}
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void atomicAdd(float4* to, float4 value) {
  const emulated::Unwatched own;
  to->x += value.x, to->y += value.y, to->z += value.z, to->w += value.w, emulated::added += 4;
}

namespace emulated {
static void (*told)(unsigned blocks, size_t shared_bytes);  // where set, it is called and no kernel runs
static void (*body)(const void*);
static const void* argument;
static char begun, ended;
inline void run() {
  for (;;) {  // a block
    acquire(&begun);
    body(argument);
    release(&ended);
    {
      const Unwatched own;
      done[threadIdx.x] = true;
      ++steps;
      block_barrier.leave(), warp_barrier().leave();
    }
    hand_over();
  }
}
}  // namespace emulated

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** list, size_t bytes,
                             cudaStream_t) {
  using namespace emulated;
  const Unwatched own;
  if (bytes > (reinterpret_cast<const void*>(kernel) == asked_for ? granted : 48 * 1024)) return 1;
  if (told) return told(grid.x, bytes), cudaSuccess;
  static void (*called)(Arguments);
  called = kernel;
  body = [](const void* a) { called(*static_cast<const Arguments*>(a)); };
  argument = list[0];
  const size_t stack = 32 * 1024;  // AddressSanitizer clears its notes on all of it at every switch
  std::vector<char> stacks(stack * block.x);
  fibers.assign(block.x, Fiber());
  for (unsigned i = 0; i < block.x; ++i) begin(fibers[i], stacks.data() + stack * i, stack, run);
  watch(block.x);
  const char* const seed = getenv("DCNV3_TEST_SHUFFLE");
  std::mt19937 random(seed ? unsigned(atoi(seed)) : 0);
  std::vector<unsigned> blocks(grid.x), order(block.x);
  std::iota(blocks.begin(), blocks.end(), 0u), std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned number : blocks) {
    blockIdx.x = number;
    // Exactly as large as asked for: AddressSanitizer sees what lies beyond.
    shared = static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
    memset(shared, 0xff, bytes);  // NaN: what is read before it is written shows
    block_barrier = {block.x};
    warp_barriers.assign(block.x / 32, {32});
    done.assign(block.x, false);
    slots.assign(2 * block.x, Slot());
    release(&begun);
    // A warp at a time for as long as it gets on, or all threads once, in any order.
    const unsigned together = seed ? block.x : 32;
    for (long all = -1; steps != all;) {
      all = steps;
      for (unsigned warp = 0; warp < block.x; warp += together) {
        for (long before = -1; steps != before;) {
          before = steps;
          if (seed) std::shuffle(order.begin(), order.end(), random);
          for (unsigned i = warp; i < warp + together; ++i) {
            threadIdx.x = order[i];
            if (done[order[i]]) continue;
            now_watch(int(order[i]));
            change(scheduler, fibers[order[i]]);
          }
        }
      }
    }
    acquire(&ended);
    free(shared);
    if (std::find(done.begin(), done.end(), false) != done.end()) {
      fprintf(stderr, "threads of a block wait for each other for ever\n");
      abort();
    }
  }
  return cudaSuccess;
}
