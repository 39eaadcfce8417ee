// q_sample: x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise, Ho et al. 2020, eq. 4, with the
// noise given, or drawn in the kernel and returned as the training target.
#pragma once

#include "checks.h"
#include "dispatch.h"
#include "q_sample.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

namespace ddpm_fast {

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

template <class State>
QSampleKernel<State> kernel_of(const QSample& a) {
  const Shape shape = shape_of(a.x_start);
  return {
      shape,
      view_of<const State>(a.x_start, shape),
      a.seed ? View<const State>{} : view_of<const State>(a.noise, shape),
      a.seed ? view_of<State>(a.noise, shape) : View<State>{},
      view_of<State>(a.x_t, shape),
      a.rows.const_data_ptr<compute_t<State>>(),
      a.rows.size(0),
      index_of(a.t),
      {index_of(a.seed), index_of(a.sample_index)},
  };
}

// The forms of the op around a backend's run(const QSampleKernel<State>&).
template <class Backend>
struct QSampleForms {
  static void launch(const QSample& a) {
    if (a.x_start.numel() == 0) return;
    const c10::DeviceGuard guard(a.x_start.device());
    dispatch(a.x_start.scalar_type(),
             [&](auto state) { Backend::run(kernel_of<typename decltype(state)::type>(a)); });
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
