// q_sample: x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise, Ho et al. 2020, eq. 4, with the
// noise given, or drawn in the kernel and returned as the training target.
//
//   functional  x_t = q_sample(x_start, t, rows, noise)
//               x_t, noise = q_sample.drawn(x_start, t, rows, seed, sample_index)
//   out         q_sample.out(..., out=, noise_out=)
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

inline void check_outputs(const Tensor& x, const OptionalTensor& given, const Tensor& noised,
                          const OptionalTensor& drawn) {
  const char* op = "q_sample";
  const Argument x_start{op, "x_start", x}, out{op, "out", noised};
  TORCH_CHECK_VALUE(given.has_value() != drawn.has_value(), op,
                    ": give noise, or noise_out to write it into");
  check_carry_no_gradient(op, {&x, &noised, address_of(given), address_of(drawn)});
  check_output(out, x_start);
  check_no_overlap(out, x_start, true);
  if (given) check_no_overlap(out, {op, "noise", *given}, true);
  if (!drawn) return;
  const Argument noise_out{op, "noise_out", *drawn};
  check_output(noise_out, x_start);
  check_no_overlap(noise_out, x_start, false);
  check_no_overlap(noise_out, out, false);
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
                  const OptionalTensor& sample_index, const Tensor& out,
                  const OptionalTensor& noise_out) {
    check_inputs(x_start, t, rows, noise, seed, sample_index);
    check_outputs(x_start, noise, out, noise_out);
    launch({x_start, t, rows, seed, sample_index, noise ? *noise : *noise_out, out});
    mark_written(out);
    if (noise_out) mark_written(*noise_out);
  }
};

}  // namespace ddpm_fast
