// What lets one function serve the C++ compiler and nvcc. No torch header may be included here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Inlining is what lets a loop around the function be compiled for another instruction set.
#define DDPM_HOST_DEVICE inline __attribute__((always_inline))
#else
#define DDPM_HOST_DEVICE inline
#endif

namespace ddpm_fast {

// Every contraction into a fused multiply-add is written out as one of these, and the compilers
// are told to make none of their own (-ffp-contract=off, --fmad=false): so all builds round alike.
DDPM_HOST_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The square root, correctly rounded, of 0 or of a number above 2^-75. On the device these are the
// steps of sqrt.rn, without its branch to what else there is: nothing can be moved across that.
DDPM_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x + 0x1p-100f));
  const float root = x * reciprocal;
  return fmaf(fmaf(-root, root, x), 0.5f * reciprocal, root);
#else
  return std::sqrt(x);
#endif
}

// nvcc would rather multiply 64 by 64 bits.
DDPM_HOST_DEVICE uint64_t multiply_words(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// nvcc would rather shift the bit down and compare it with one.
DDPM_HOST_DEVICE bool has_bit(uint32_t word, int bit) {
#if defined(__CUDA_ARCH__)
  uint32_t masked;
  asm("and.b32 %0, %1, %2;" : "=r"(masked) : "r"(word), "r"(1u << bit));
  return masked != 0;
#else
  return static_cast<int32_t>(word << (31 - bit)) < 0;
#endif
}

DDPM_HOST_DEVICE int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DDPM_HOST_DEVICE float float_from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace ddpm_fast
