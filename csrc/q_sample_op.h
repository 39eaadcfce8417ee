// q_sample: x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise, Ho et al. 2020, eq. 4, with the
// noise given, or drawn in the kernel and returned as the training target.
//
//   functional  x_t = q_sample(x_start, t, rows, noise)
//               x_t, noise = q_sample.drawn(x_start, t, rows, seed, sample_index)
//   out         q_sample.out(..., x_t, drawn_noise)
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

inline void check_inputs(const Tensor& x, const Tensor& t, const Tensor& rows,
                         const OptionalTensor& noise, const OptionalTensor& seed,
                         const OptionalTensor& sample_index) {
  const char* op = "q_sample";
  const Argument x_start{op, "x_start", x};
  check_floating(x_start);
  check_batch(x_start);
  check_layout(x_start);
  check_rows({op, "rows", rows}, x_start, kForwardRowLength);
  check_index({op, "t", t}, x_start, true);
  check_range({op, "t", t}, {op, "rows", rows});
  check_noise_source(x_start, noise, seed, sample_index);
  if (noise) check_like({op, "noise", *noise}, x_start);
}

inline void check_outputs(const Tensor& x, const OptionalTensor& noise, const Tensor& noised,
                          const OptionalTensor& drawn) {
  const char* op = "q_sample";
  const Argument x_start{op, "x_start", x}, x_t{op, "x_t", noised};
  TORCH_CHECK_VALUE(noise.has_value() != drawn.has_value(), op,
                    ": give noise, or drawn_noise to write it into");
  check_output(x_t, x_start);
  check_no_overlap(x_t, x_start, true);
  if (noise) check_no_overlap(x_t, {op, "noise", *noise}, true);
  if (!drawn) return;
  const Argument drawn_noise{op, "drawn_noise", *drawn};
  check_output(drawn_noise, x_start);
  check_no_overlap(drawn_noise, x_start, false);
  check_no_overlap(drawn_noise, x_t, false);
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
    check_inputs(x_start, t, rows, noise, {}, {});
    const Tensor x_t = at::empty_like(x_start);
    launch({x_start, t, rows, {}, {}, noise, x_t});
    return x_t;
  }

  static std::tuple<Tensor, Tensor> drawn(const Tensor& x_start, const Tensor& t,
                                          const Tensor& rows, const Tensor& seed,
                                          const Tensor& sample_index) {
    check_inputs(x_start, t, rows, {}, seed, sample_index);
    const Tensor x_t = at::empty_like(x_start), noise = at::empty_like(x_start);
    launch({x_start, t, rows, seed, sample_index, noise, x_t});
    return {x_t, noise};
  }

  static void out(const Tensor& x_start, const Tensor& t, const Tensor& rows,
                  const OptionalTensor& noise, const OptionalTensor& seed,
                  const OptionalTensor& sample_index, const Tensor& x_t,
                  const OptionalTensor& drawn_noise) {
    check_inputs(x_start, t, rows, noise, seed, sample_index);
    check_outputs(x_start, noise, x_t, drawn_noise);
    launch({x_start, t, rows, seed, sample_index, noise ? *noise : *drawn_noise, x_t});
    mark_written(x_t);
    if (drawn_noise) mark_written(*drawn_noise);
  }
};

}  // namespace ddpm_fast
