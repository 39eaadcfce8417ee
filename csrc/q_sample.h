// q_sample: x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise, Ho et al. 2020, eq. 4, with the
// noise given, or drawn in the kernel and returned as the training target.
#pragma once

#include "dispatch.h"
#include "noise_source.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

namespace ddpm_fast {

// A row of the table: the factors of x_start and of the noise.
constexpr int kForwardRowLength = 2;

struct QSample {
  const Tensor &x_start, &t, &rows;
  const OptionalTensor &seed, &sample_index;
  const Tensor &noise, &x_t;
};

inline void check_inputs(const Tensor& x, const Tensor& t, const Tensor& rows) {
  const char* op = "q_sample";
  const Argument x_start{op, "x_start", x};
  check_floating(x_start);
  check_batch(x_start);
  check_layout(x_start);
  check_rows({op, "rows", rows}, x_start, kForwardRowLength);
  check_index({op, "t", t}, x_start, true);
  check_range({op, "t", t}, {op, "rows", rows});
}

template <class State_>
struct QSampleKernel {
  using State = State_;
  using T = typename Compute<State>::type;

  Shape shape;
  View<const State> x_start;
  View<const State> given_noise;
  View<State> drawn_noise;
  View<State> x_t;
  const T* rows;
  int64_t num_rows;
  Index t;
  NoiseSource source;

  explicit QSampleKernel(const QSample& a)
      : shape(shape_of(a.x_start)),
        x_start(view_of<const State>(a.x_start, shape)),
        given_noise(a.seed ? View<const State>{} : view_of<const State>(a.noise, shape)),
        drawn_noise(a.seed ? view_of<State>(a.noise, shape) : View<State>{}),
        x_t(view_of<State>(a.x_t, shape)),
        rows(a.rows.const_data_ptr<T>()),
        num_rows(a.rows.size(0)),
        t(a.t),
        source{Index(a.seed), Index(a.sample_index)} {}

  DDPM_HOST_DEVICE T signal(int64_t sample) const { return rows[t[sample] * kForwardRowLength]; }
  DDPM_HOST_DEVICE T scale(int64_t sample) const { return rows[t[sample] * kForwardRowLength + 1]; }
};

// The forms of the op around a backend's run(const QSampleKernel<State>&).
template <class Backend>
struct QSampleForms {
  static void launch(const QSample& a) {
    if (a.x_start.numel() == 0) return;
    const c10::DeviceGuard guard(a.x_start.device());
    dispatch(a.x_start.scalar_type(),
             [&](auto state) { Backend::run(QSampleKernel<typename decltype(state)::type>(a)); });
  }

  static Tensor given(const Tensor& x_start, const Tensor& t, const Tensor& rows,
                      const Tensor& noise) {
    check_inputs(x_start, t, rows);
    check_like({"q_sample", "noise", noise}, {"q_sample", "x_start", x_start});
    const Tensor x_t = at::empty_like(x_start);
    launch({x_start, t, rows, {}, {}, noise, x_t});
    return x_t;
  }

  static std::tuple<Tensor, Tensor> drawn(const Tensor& x_start, const Tensor& t,
                                          const Tensor& rows, const Tensor& seed,
                                          const Tensor& sample_index) {
    check_inputs(x_start, t, rows);
    check_noise_source({"q_sample", "x_start", x_start}, {}, seed, sample_index);
    const Tensor x_t = at::empty_like(x_start), noise = at::empty_like(x_start);
    launch({x_start, t, rows, seed, sample_index, noise, x_t});
    return {x_t, noise};
  }
};

}  // namespace ddpm_fast
