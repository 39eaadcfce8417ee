// One source for every instruction set: a kernel is compiled for plain x86-64 (or whatever the
// compiler's target is), AVX2 and AVX-512, and the best that PyTorch sees is chosen at run time.
// ATEN_CPU_CAPABILITY=default|avx2|avx512 in the environment chooses a lesser one.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define DDPM_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define DDPM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define DDPM_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#else
#define DDPM_TARGET_AVX2
#define DDPM_TARGET_AVX512
#endif

#if defined(__GNUC__)
#define DDPM_INLINE inline __attribute__((always_inline))
#define DDPM_LAMBDA_INLINE __attribute__((always_inline))
#else
#define DDPM_INLINE inline
#define DDPM_LAMBDA_INLINE
#endif

// Says of the loop that follows that its iterations are independent of each other, so that input
// and output may be the same memory.
#if defined(__clang__)
#define DDPM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define DDPM_INDEPENDENT _Pragma("GCC ivdep")
#else
#define DDPM_INDEPENDENT
#endif

#if defined(__GNUC__)
#define DDPM_UNROLLED _Pragma("GCC unroll 16")
#else
#define DDPM_UNROLLED
#endif

#if defined(__GNUC__)
#define DDPM_PREFETCH(address) __builtin_prefetch(address)
#else
#define DDPM_PREFETCH(address)
#endif

namespace ddpm_fast::cpu {

// Body::run(args...) must be DDPM_INLINE all the way down, to be compiled for each target.
template <class Body, class... Args>
DDPM_TARGET_AVX512 void run_avx512(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
DDPM_TARGET_AVX2 void run_avx2(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
void run_plain(Args... args) {
  Body::run(args...);
}

template <class ForAvx512, class ForAvx2, class ForAny, class... Args>
auto best_of() -> void (*)(Args...) {
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return run_avx512<ForAvx512, Args...>;
  if (capability == "AVX2") return run_avx2<ForAvx2, Args...>;
  return run_plain<ForAny, Args...>;
}

template <class Body, class... Args>
auto best_version() -> void (*)(Args...) {
  return best_of<Body, Body, Body, Args...>();
}

}  // namespace ddpm_fast::cpu
