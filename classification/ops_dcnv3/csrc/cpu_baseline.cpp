// The CPU kernels for any processor of the family, and the choice between the instruction sets.
#include "dcnv3.h"
#include "dcnv3_math.h"

#define DCNV3_ISA baseline
#define DCNV3_VECTOR_BYTES 16
#include "cpu_kernels.inc"

namespace dcnv3 {

#if defined(__x86_64__)
namespace avx2 {
void run_forward(const Problem& p, int64_t begin, int64_t end);
void run_backward(const Problem& p, int64_t begin, int64_t end);
}  // namespace avx2
#endif

namespace {
struct Kernels {
  void (*forward)(const Problem&, int64_t, int64_t);
  void (*backward)(const Problem&, int64_t, int64_t);
};

Kernels choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {avx2::run_forward, avx2::run_backward};
#endif
  return {baseline::run_forward, baseline::run_backward};
}
const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}
}  // namespace

int64_t cpu_forward_tasks(const Problem& p) { return p.batch * p.out_height; }
int64_t cpu_backward_tasks(const Problem& p) { return p.batch * p.group; }
void cpu_forward(const Problem& p, int64_t begin, int64_t end) { kernels().forward(p, begin, end); }
void cpu_backward(const Problem& p, int64_t begin, int64_t end) { kernels().backward(p, begin, end); }

}  // namespace dcnv3
