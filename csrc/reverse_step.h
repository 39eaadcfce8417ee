// What the kernel of reverse_step needs to know, as plain data; csrc/reverse_step_op.h makes it of
// tensors.
#pragma once

#include "layout.h"
#include "noise_source.h"
#include "step_math.h"

namespace ddpm_fast {

// A number for each sample.
template <class T>
struct PerSample {
  const T* data = nullptr;
  int64_t stride = 0;

  DDPM_HOST_DEVICE bool present() const { return data != nullptr; }
  DDPM_HOST_DEVICE T operator[](int64_t sample) const { return data[sample * stride]; }
};

// w of classifier-free guidance, for each row and sample (a stride of 0: for all of them).
template <class T>
struct GuidanceScale {
  const T* data = nullptr;
  int64_t row_stride = 0, sample_stride = 0;

  DDPM_HOST_DEVICE bool present() const { return data != nullptr; }
  DDPM_HOST_DEVICE T at(int64_t row, int64_t sample) const {
    return data[row * row_stride + sample * sample_stride];
  }
};

// The step index and the timesteps that the next call of the network and the kernel want: written
// here, a captured graph goes on by itself.
struct Next {
  int64_t *step = nullptr, *t = nullptr;
  int64_t step_stride = 0, t_stride = 0;
  bool twice = false;  // guidance wants the timesteps again, behind the others
};

template <class State_, class Output_>
struct ReverseStepKernel {
  using State = State_;
  using Output = Output_;
  using T = compute_t<State>;

  Shape shape;
  View<const State> x_t, noise, x0_prev, known, mask;
  View<const Output> model_output;  // with guidance, the unconditional samples behind the others
  View<State> out, pred_xstart;
  AnyView next_input;
  int64_t next_input_copies;
  bool reads_variance;
  T clip;
  const T* rows;
  int64_t num_rows;
  Index step;
  GuidanceScale<T> guidance;
  PerSample<T> guidance_factor, threshold;
  NoiseSource source;
  Next next;

  DDPM_HOST_DEVICE const StepRow<T>& row(int64_t number) const {
    return *reinterpret_cast<const StepRow<T>*>(rows + number * kRowLength);
  }
  DDPM_HOST_DEVICE bool adds_noise(const StepRow<T>& row) const {
    return row.sigma != T(0) || (known.present() && row.known_sigma != T(0));
  }
  DDPM_HOST_DEVICE bool draws_noise(const StepRow<T>& row) const {
    return source.present() && adds_noise(row);
  }
  DDPM_HOST_DEVICE bool reads_noise(const StepRow<T>& row) const {
    return noise.present() && adds_noise(row);
  }
  DDPM_HOST_DEVICE NoiseKey noise_key(int64_t sample, const StepRow<T>& row) const {
    return source.key(sample, static_cast<int64_t>(row.timestep), static_cast<int64_t>(row.stream));
  }
  DDPM_HOST_DEVICE T clip_of(int64_t sample) const {
    return threshold.present() ? threshold[sample] : clip;
  }
  DDPM_HOST_DEVICE T factor_of(int64_t sample) const {
    return guidance_factor.present() ? guidance_factor[sample] : T(1);
  }

  // Called once for each sample. Others may still be reading `step`.
  DDPM_HOST_DEVICE void advance(int64_t sample) const {
    const int64_t following = step[sample] + 1 == num_rows ? 0 : step[sample] + 1;
    if (next.step != nullptr && (sample == 0 || next.step_stride != 0)) {
      next.step[sample * next.step_stride] = following;
    }
    if (next.t == nullptr) return;
    const auto timestep = static_cast<int64_t>(row(following).timestep);
    next.t[sample * next.t_stride] = timestep;
    if (next.twice) next.t[(shape.samples + sample) * next.t_stride] = timestep;
  }
};

}  // namespace ddpm_fast
