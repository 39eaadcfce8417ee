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

namespace ddpm_fast::cpu {

// Body::run(args...) must be DDPM_INLINE all the way down, to be compiled for each target.
template <class Body, class... Args>
DDPM_TARGET_AVX512 void run_avx512(const Args&... args) {
  Body::run(args...);
}

template <class Body, class... Args>
DDPM_TARGET_AVX2 void run_avx2(const Args&... args) {
  Body::run(args...);
}

template <class Body, class... Args>
void run_plain(const Args&... args) {
  Body::run(args...);
}

template <class Body, class... Args>
void (*best_version())(const Args&...) {
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return run_avx512<Body, Args...>;
  if (capability == "AVX2") return run_avx2<Body, Args...>;
  return run_plain<Body, Args...>;
}

}  // namespace ddpm_fast::cpu
