// The choice between the sets of CPU kernels, when the program runs.
#include "dcnv3.h"

#include <string.h>

#ifndef DCNV3_CPU_HAS  // the tests have processors of their own
#define DCNV3_CPU_HAS(feature) __builtin_cpu_supports(feature)
#endif

namespace dcnv3 {

#define DCNV3_DECLARE(isa)                                       \
  namespace isa {                                                \
  void run_forward(const Problem& p, int64_t begin, int64_t end);  \
  void run_backward(const Problem& p, int64_t begin, int64_t end); \
  }
DCNV3_DECLARE(baseline)
#if defined(__x86_64__)
DCNV3_DECLARE(avx2)
DCNV3_DECLARE(avx512)
#endif

const CpuKernels* cpu_kernels(const char* name) {
#define DCNV3_OFFER(isa, title, runs)                                             \
  static const CpuKernels isa##_kernels{title, isa::run_forward, isa::run_backward}; \
  if ((!name || !strcmp(name, title)) && (runs)) return &isa##_kernels;
#if defined(__x86_64__)
  DCNV3_OFFER(avx512, "AVX-512", DCNV3_CPU_HAS("avx512f") && DCNV3_CPU_HAS("avx512bw") && DCNV3_CPU_HAS("avx512dq") &&
                                     DCNV3_CPU_HAS("avx512vl") && DCNV3_CPU_HAS("fma"))
  DCNV3_OFFER(avx2, "AVX2", DCNV3_CPU_HAS("avx2") && DCNV3_CPU_HAS("fma"))
#endif
  DCNV3_OFFER(baseline, "baseline", true)
  return nullptr;
}

int64_t cpu_forward_tasks(const Problem& p) { return p.batch * p.out_height; }
int64_t cpu_backward_tasks(const Problem& p) { return p.batch * p.group; }

}  // namespace dcnv3
