// What the kernel of q_sample needs to know, as plain data; csrc/q_sample_op.h makes it of tensors.
#pragma once

#include "layout.h"
#include "noise_source.h"

namespace ddpm_fast {

// A row of the table: the factors of x_start and of the noise.
constexpr int kForwardRowLength = 2;

template <class State_>
struct QSampleKernel {
  using State = State_;
  using T = compute_t<State>;

  Shape shape;
  View<const State> x_start;
  View<const State> given_noise;
  View<State> drawn_noise;
  View<State> x_t;
  const T* rows;
  int64_t num_rows;
  Index t;
  NoiseSource source;

  DDPM_HOST_DEVICE T signal(int64_t sample) const { return rows[t[sample] * kForwardRowLength]; }
  DDPM_HOST_DEVICE T scale(int64_t sample) const { return rows[t[sample] * kForwardRowLength + 1]; }
};

}  // namespace ddpm_fast
