// The arithmetic of one sampling step, for one element. Ho et al. 2020 (arXiv 2006.11239), eqs.
// 7, 11 and 15, and every other sampler that is linear around one clamp:
//
//   pred_xstart = clamp(x0_from_xt x_t + x0_from_out out)
//   x_prev = mean_from_x0 pred_xstart + mean_from_xt x_t + mean_from_out out
//          + mean_from_x0_prev previous pred_xstart + stddev noise
//
// and where a mask keeps what is known of x_start,
//
//   x_prev = mask (known_from_x0 known + known_sigma noise) + (1 - mask) x_prev
//
// A step reads x_t and out once and writes x_prev once: 12 bytes an element in float32, the noise
// included, since it is drawn in registers.
#pragma once

#include "portable.h"

namespace ddpm_fast {

// One row of the step table: the columns of ddpm_fast.reference.ROW, in its order.
template <class T>
struct StepRow {
  T x0_from_xt, x0_from_out;
  T mean_from_x0, mean_from_xt, mean_from_out, mean_from_x0_prev;
  T sigma, min_log_variance, max_log_variance;
  T timestep, stream;
  T known_from_x0, known_sigma;
};

constexpr int kRowLength = 13;
static_assert(sizeof(StepRow<float>) == kRowLength * sizeof(float), "a row has no padding");

// A coefficient of zero reads nothing: neither an overflow to infinity nor an unwritten buffer
// that a step has no use for may turn its result into NaN.
template <class T>
DDPM_HOST_DEVICE T term(T coefficient, T value) {
  return coefficient == T(0) ? T(0) : coefficient * value;
}

// Both comparisons are false for NaN, which passes through as in torch.clamp.
template <class T>
DDPM_HOST_DEVICE T clamp(T x, T bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == sizeof(float)) {  // two instructions in place of four
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-bound));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
    return x;
  }
#endif
  const T below = x < -bound ? -bound : x;
  return below > bound ? bound : below;
}

// Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), with w = 1 + their w.
template <class T>
DDPM_HOST_DEVICE T guide(T w, T cond, T uncond) {
  return uncond + term(w, cond - uncond);
}

// DDPM and DDIM do without mean_from_out, and seldom is another coefficient of theirs zero. Code
// that asks this once for many elements may then call what follows with kUsual, free of choices.
template <class T>
DDPM_HOST_DEVICE bool is_usual(const StepRow<T>& row) {
  return row.x0_from_xt != T(0) && row.x0_from_out != T(0) && row.mean_from_x0 != T(0) &&
         row.mean_from_xt != T(0) && row.mean_from_out == T(0);
}

template <bool kUsual = false, class T>
DDPM_HOST_DEVICE T predict_xstart(const StepRow<T>& row, T x_t, T out, T clip) {
  if constexpr (kUsual) return clamp(row.x0_from_xt * x_t + row.x0_from_out * out, clip);
  return clamp(term(row.x0_from_xt, x_t) + term(row.x0_from_out, out), clip);
}

template <bool kUsual = false, class T>
DDPM_HOST_DEVICE T step_mean(const StepRow<T>& row, T xstart, T x_t, T out) {
  if constexpr (kUsual) return row.mean_from_x0 * xstart + row.mean_from_xt * x_t;
  return term(row.mean_from_x0, xstart) + term(row.mean_from_xt, x_t) +
         term(row.mean_from_out, out);
}

DDPM_HOST_DEVICE double exponential(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return std::exp(x);
#endif
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, as IEEE operations only, so that every build rounds alike.
// It saturates at 2^-126 and 2^126, past any standard deviation.
DDPM_HOST_DEVICE float exponential(float x) {
  const float bounded = clamp(x, 126.0f * 0x1.62e43p-1f);
  const float n = fma(bounded, 0x1.715476p+0f, 0x1.8p+23f) - 0x1.8p+23f;
  const float r = fma(n, 0x1.05c610p-29f, fma(n, -0x1.62e430p-1f, bounded));
  float p = 0x1.6a4746p-10f;
  p = fma(p, r, 0x1.1239a2p-7f);
  p = fma(p, r, 0x1.5558b6p-5f);
  p = fma(p, r, 0x1.555492p-3f);
  p = fma(p, r, 0x1.fffffcp-2f);
  const float mantissa = fma(r * r, p, r) + 1.0f;
  const int32_t exponent = x == x ? static_cast<int32_t>(n) : 0;
  return mantissa * float_from_bits((exponent + 127) * (1 << 23));
}

// Inpainting, Lugmayr et al. 2022 (arXiv 2201.09865), eq. 8, with one noise for both parts, of
// which a pixel has only one.
template <class T>
DDPM_HOST_DEVICE T keep_known(T mask, T known, T step) {
  return term(mask, known) + term(T(1) - mask, step);
}

// sigma_t of a learned variance: the output v in [-1, 1] runs between two log-variances, Nichol &
// Dhariwal 2021 (arXiv 2102.09672), eq. 15; the ends -1 and 1 make v the log-variance itself.
template <class T>
DDPM_HOST_DEVICE T learned_stddev(const StepRow<T>& row, T v) {
  const T fraction = (v + T(1)) * T(0.5);
  const T log_variance = fraction * row.max_log_variance + (T(1) - fraction) * row.min_log_variance;
  return row.sigma * exponential(T(0.5) * log_variance);
}

}  // namespace ddpm_fast
