// Just enough of CUDA to run the kernels' own source on a CPU, where no GPU is: every thread of a block
// is a fiber, and barriers and shuffles hand over to the next one. It shows whether indices, guards and
// sums are right; nothing about speed, and nothing about races between blocks.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define DCNV3_EMULATED
#define __global__
#define __device__
#define __launch_bounds__(...)
#define DCNV3_ENTRY(kernel) kernel
#define DCNV3_SHARED(name) Wide* const name = reinterpret_cast<Wide*>(emulated::shared)

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

static dim3 threadIdx, blockIdx;

namespace emulated {
static char* shared;
static std::vector<ucontext_t> fibers;
static std::vector<long> block_barriers, warp_barriers;  // how many each fiber has reached
static std::vector<bool> done;
static std::vector<double> slots;  // what a thread offers to its warp, in turn by one of two
static long steps;                 // of all fibers together
static ucontext_t scheduler;

inline void hand_over() { swapcontext(&fibers[threadIdx.x], &scheduler); }

// Waits until all threads [first, last) have reached as many barriers as this one.
inline void wait_for(std::vector<long>& reached, unsigned first, unsigned last) {
  const long mine = ++reached[threadIdx.x];
  ++steps;
  for (unsigned i = first; i < last; ++i)
    while (!done[i] && reached[i] < mine) hand_over();
}
inline unsigned warp() { return threadIdx.x / 32 * 32; }
}  // namespace emulated

inline void __syncthreads() { emulated::wait_for(emulated::block_barriers, 0, unsigned(emulated::fibers.size())); }
inline void __syncwarp() { emulated::wait_for(emulated::warp_barriers, emulated::warp(), emulated::warp() + 32); }
template <typename A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  // Two places a thread: a quick one offers its next value while a slow one still reads.
  const long turn = emulated::warp_barriers[threadIdx.x] % 2;
  emulated::slots[2 * threadIdx.x + turn] = value;
  __syncwarp();
  return A(emulated::slots[2 * (threadIdx.x ^ unsigned(mask)) + turn]);
}
template <typename A>
void atomicAdd(A* to, A value) {
  *to += value;
}
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void atomicAdd(float4* to, float4 value) {
  to->x += value.x, to->y += value.y, to->z += value.z, to->w += value.w;
}

namespace emulated {
static void (*body)(const void*);
static const void* argument;
inline void run() {
  body(argument);
  done[threadIdx.x] = true;
  ++steps;
  for (;;) hand_over();
}
}  // namespace emulated

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** list, size_t bytes,
                             cudaStream_t) {
  using namespace emulated;
  static void (*called)(Arguments);
  called = kernel;
  body = [](const void* a) { called(*static_cast<const Arguments*>(a)); };
  argument = list[0];
  const size_t stack = 256 * 1024;
  std::vector<char> stacks(stack * block.x);
  // Exactly as large as asked for: AddressSanitizer sees what lies beyond.
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    shared = static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
    memset(shared, 0xff, bytes);  // NaN: what is read before it is written shows
    fibers.assign(block.x, ucontext_t());
    block_barriers.assign(block.x, 0);
    warp_barriers.assign(block.x, 0);
    done.assign(block.x, false);
    slots.assign(2 * block.x, 0);
    for (unsigned i = 0; i < block.x; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks.data() + stack * i;
      fibers[i].uc_stack.ss_size = stack;
      makecontext(&fibers[i], run, 0);
    }
    // A warp at a time, for as long as it gets on.
    for (long all = -1; steps != all;) {
      all = steps;
      for (unsigned warp = 0; warp < block.x; warp += 32) {
        for (long before = -1; steps != before;) {
          before = steps;
          for (unsigned i = warp; i < warp + 32; ++i) {
            if (done[i]) continue;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i]);
          }
        }
      }
    }
    free(shared);
  }
  return cudaSuccess;
}
