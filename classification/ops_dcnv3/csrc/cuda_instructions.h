// A GPU's own instructions, as functions. tests/imitation/ has others of the same names for a CPU.
#pragma once

namespace dcnv3 {
namespace {

DCNV3_INLINE float float_of_half_bits(uint16_t bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
}
DCNV3_INLINE uint16_t half_bits_of(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#if __CUDA_ARCH__ >= 800
DCNV3_INLINE uint16_t bfloat_bits_of(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif
// 2^x with an error of 2^-22; a result below the normal numbers is 0.
DCNV3_INLINE float rough_power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// Rounded down; the nearest integer that exists, and 0 for NaN.
DCNV3_INLINE int integer_below(float x) { return __float2int_rd(x); }
DCNV3_INLINE int integer_below(double x) { return __double2int_rd(x); }

}  // namespace
}  // namespace dcnv3
