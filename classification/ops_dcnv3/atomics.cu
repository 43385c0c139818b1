// What float32 atomic adds cost, by how the threads of a warp share them out: benchmark.py compiles and
// runs this. The backward pass adds rows of 16 numbers (a group's channels) to rows of memory drawn at
// random; whatever it does, it cannot be faster than the fastest of these.
//
// Prints one line a way: name|ms for a million rows, the median of all runs. Every way adds the same numbers.
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include <algorithm>
#include <vector>

constexpr int kRow = 16;              // numbers of a row: 64 bytes, two sectors
constexpr uint32_t kRows = 1u << 18;  // rows of memory: 16 MiB, about the gradient of a level's input
constexpr uint32_t kAdded = 1u << 22;  // rows added to it
constexpr int kThreads = 256, kRuns = 25;

__device__ inline uint32_t row_of(uint32_t i) {  // scattered, and without a load that would count
  i *= 2654435761u;
  i ^= i >> 15;
  i *= 2246822519u;
  return (i ^ (i >> 13)) % kRows;
}

// `lanes` threads a row, each adding its 16 / lanes numbers one at a time: neighbouring numbers if
// `blocked`, otherwise every lanes-th, so that the threads of an instruction add to neighbouring ones.
template <int lanes, bool blocked>
__global__ void scalar(float* memory) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, lane = thread % lanes;
  float* const row = memory + size_t(row_of(thread / lanes)) * kRow;
#pragma unroll
  for (int j = 0; j < kRow / lanes; ++j)
    atomicAdd(row + (blocked ? lane * (kRow / lanes) + j : j * lanes + lane), 1.0f);
}

// Four at a time, which GPUs can since sm_90.
template <int lanes, bool blocked>
__global__ void vector(float* memory) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, lane = thread % lanes;
  float4* const row = reinterpret_cast<float4*>(memory + size_t(row_of(thread / lanes)) * kRow);
#pragma unroll
  for (int j = 0; j < kRow / 4 / lanes; ++j)
    atomicAdd(row + (blocked ? lane * (kRow / 4 / lanes) + j : j * lanes + lane), make_float4(1, 1, 1, 1));
#endif
}

// The same rows written without adding: what memory itself costs.
__global__ void stored(float* memory) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, lane = thread % 4;
  reinterpret_cast<float4*>(memory + size_t(row_of(thread / 4)) * kRow)[lane] = make_float4(1, 1, 1, 1);
}

int main() {
  struct Way {
    const char* name;
    void (*kernel)(float*);
    int lanes;
    bool adds_four;
  };
  const Way ways[] = {
      {"2 threads a row, one number at a time, 8 neighbours each", scalar<2, true>, 2, false},
      {"4 threads a row, one number at a time, half sectors", scalar<4, false>, 4, false},
      {"8 threads a row, one number at a time, whole sectors", scalar<8, false>, 8, false},
      {"16 threads a row, one number at a time, the whole row", scalar<16, false>, 16, false},
      {"2 threads a row, four at a time, half sectors", vector<2, true>, 2, true},
      {"2 threads a row, four at a time, whole sectors", vector<2, false>, 2, true},
      {"4 threads a row, four at a time, the whole row", vector<4, false>, 4, true},
      {"stores instead of adds", stored, 4, false},
  };
  cudaDeviceProp properties;
  float* memory;
  if (cudaGetDeviceProperties(&properties, 0) || cudaMalloc(&memory, size_t(kRows) * kRow * sizeof(float))) {
    fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  for (const Way& way : ways) {
    if (way.adds_four && (properties.major < 9 || CUDART_VERSION < 12010)) continue;
    std::vector<float> times;
    for (int run = -3; run < kRuns; ++run) {
      cudaMemset(memory, 0, size_t(kRows) * kRow * sizeof(float));
      cudaEvent_t start, end;
      cudaEventCreate(&start), cudaEventCreate(&end);
      cudaEventRecord(start);
      way.kernel<<<kAdded / kThreads * way.lanes, kThreads>>>(memory);
      cudaEventRecord(end);
      cudaEventSynchronize(end);
      float ms = 0;
      cudaEventElapsedTime(&ms, start, end);
      if (run >= 0) times.push_back(ms);
      cudaEventDestroy(start), cudaEventDestroy(end);
    }
    // Every number of a row must have got as much as there were additions to it: a way that loses some is no way.
    std::vector<float> sums(size_t(kRows) * kRow);
    cudaMemcpy(sums.data(), memory, sums.size() * sizeof(float), cudaMemcpyDeviceToHost);
    double total = 0;
    for (float sum : sums) total += sum;
    if (cudaGetLastError() != cudaSuccess || (way.kernel != stored && total != double(kAdded) * kRow)) {
      fprintf(stderr, "%s: wrong sums\n", way.name);
      return 1;
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    printf("%s|%.6f\n", way.name, times[kRuns / 2] / (kAdded / 1e6));
  }
  return 0;
}
