// The choice of cpu.cpp on other processors: `processors FEATURE...` prints which kernels one with these features gets.
#include <stdio.h>
#include <string.h>

static char** features;
static bool has(const char* feature) {
  for (char** given = features; *given; ++given)
    if (!strcmp(*given, feature)) return true;
  return false;
}
#define DCNV3_CPU_HAS(feature) has(feature)
#include "cpu.cpp"

namespace dcnv3 {
#define DCNV3_STAND_IN(isa)                                                    \
  namespace isa {                                                              \
  void run_forward(const Problem&, int64_t, int64_t) { puts(#isa " forward"); }   \
  void run_backward(const Problem&, int64_t, int64_t) { puts(#isa " backward"); } \
  }
DCNV3_STAND_IN(baseline)
DCNV3_STAND_IN(avx2)
DCNV3_STAND_IN(avx512)
}  // namespace dcnv3

int main(int, char** arguments) {
  features = arguments + 1;
  const dcnv3::CpuKernels* chosen = dcnv3::cpu_kernels();
  puts(chosen->name);
  chosen->forward({}, 0, 0), chosen->backward({}, 0, 0);
}
