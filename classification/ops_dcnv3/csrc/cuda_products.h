// Products of a warp on tensor cores, as functions; tests/imitation/ has others of the same names. What a thread has of
// the tables, with g = lane / 4 and t = lane % 4, as in the PTX manual:
//   sums[16][8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1);
//   tf32: a[16][8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b[8][8]: (t, g), (t + 4, g);
//   16 bits: a[16][16] and b[16][8], the same with two neighbours along the inner dimension in each register.
#pragma once

#include "dcnv3_math.h"

namespace dcnv3 {
namespace {

__device__ inline void add_product(float* sums, const uint32_t* a, const uint32_t* b, int kind) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define DCNV3_PRODUCT(types)                                                                               \
  asm("mma.sync.aligned." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if (kind == 0) DCNV3_PRODUCT("m16n8k8.row.col.f32.tf32.tf32.f32");
  if (kind == 1) DCNV3_PRODUCT("m16n8k16.row.col.f32.bf16.bf16.f32");
  if (kind == 2) DCNV3_PRODUCT("m16n8k16.row.col.f32.f16.f16.f32");
#undef DCNV3_PRODUCT
#else
  __trap();  // an older GPU never starts these kernels
#endif
}
// Of a number the lower 13 bits are not read.
__device__ inline void add_product_tf32(float* sums, const float* a, const float* b) {
  uint32_t of_a[4], of_b[2];
  memcpy(of_a, a, sizeof(of_a)), memcpy(of_b, b, sizeof(of_b));
  add_product(sums, of_a, of_b, 0);
}
__device__ inline void add_product_bfloat(float* sums, const uint32_t* a, const uint32_t* b) {
  add_product(sums, a, b, 1);
}
__device__ inline void add_product_half(float* sums, const uint32_t* a, const uint32_t* b) {
  add_product(sums, a, b, 2);
}

}  // namespace
}  // namespace dcnv3
