// reverse_step: its arguments, their checks, and the three forms of the op, for every backend.
//
//   functional  x_prev = reverse_step(x_t, model_output, rows, step, ...)
//   in place    reverse_step_(x_t, ...)            x_prev over x_t
//   out         reverse_step.out(..., out=)        x_prev into out
//
// The last two also write pred_xstart where a tensor for it is given.
#pragma once

#include "dispatch.h"
#include "noise_source.h"
#include "step_math.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

namespace ddpm_fast {

struct ReverseStep {
  const Tensor &x_t, &model_output, &rows, &step;
  const OptionalTensor &noise, &seed, &sample_index, &x0_prev;
  const std::optional<double>& clip;
  const Tensor& out;
  const OptionalTensor& pred_xstart;
};

inline bool reads_variance(const ReverseStep& a) { return a.model_output.size(1) != a.x_t.size(1); }

inline void check_inputs(const Tensor& x, const Tensor& output, const Tensor& rows,
                         const Tensor& step, const OptionalTensor& noise,
                         const OptionalTensor& seed, const OptionalTensor& sample_index,
                         const OptionalTensor& x0_prev, const std::optional<double>& clip) {
  const char* op = "reverse_step";
  const Argument x_t{op, "x_t", x}, model_output{op, "model_output", output};
  check_floating(x_t);
  check_batch(x_t);
  check_layout(x_t);

  check_floating(model_output);
  TORCH_CHECK_TYPE((output.scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble), op,
                   ": model_output and x_t must both be float64, or neither; got ",
                   dtype_name(output.scalar_type()), " and ", dtype_name(x.scalar_type()));
  check_device(model_output, x_t);
  auto doubled = x.sizes().vec();
  doubled[1] *= 2;
  TORCH_CHECK_VALUE(output.sizes() == x.sizes() || output.sizes() == at::IntArrayRef(doubled), op,
                    ": model_output must have the shape of x_t, or twice its channels; got ",
                    output.sizes(), " and ", x.sizes());
  check_layout(model_output);

  check_rows({op, "rows", rows}, x_t, kRowLength);
  check_index({op, "step", step}, x_t, true);
  check_range({op, "step", step}, {op, "rows", rows});
  check_noise_source(x_t, noise, seed, sample_index);
  if (noise) check_like({op, "noise", *noise}, x_t);
  if (x0_prev) check_like({op, "x0_prev", *x0_prev}, x_t);
  TORCH_CHECK_VALUE(!clip || *clip > 0, op, ": clip must be positive, or None; got ", *clip);
}

inline void check_outputs(const ReverseStep& a) {
  const char* op = "reverse_step";
  const Argument x_t{op, "x_t", a.x_t}, out{op, "out", a.out};
  check_output(out, x_t);
  check_no_overlap(out, x_t, true);
  // A network may return its own input.
  check_no_overlap(out, {op, "model_output", a.model_output}, true);
  if (a.noise) check_no_overlap(out, {op, "noise", *a.noise}, false);
  if (a.x0_prev) check_no_overlap(out, {op, "x0_prev", *a.x0_prev}, false);
  if (!a.pred_xstart) return;
  const Argument pred_xstart{op, "pred_xstart", *a.pred_xstart};
  check_output(pred_xstart, x_t);
  check_no_overlap(pred_xstart, x_t, false);
  check_no_overlap(pred_xstart, out, false);
  check_no_overlap(pred_xstart, {op, "model_output", a.model_output}, false);
  if (a.noise) check_no_overlap(pred_xstart, {op, "noise", *a.noise}, false);
  if (a.x0_prev) check_no_overlap(pred_xstart, {op, "x0_prev", *a.x0_prev}, true);
}

// What a kernel needs to know, as plain data.
template <class State_, class Output_>
struct ReverseStepKernel {
  using State = State_;
  using Output = Output_;
  using T = typename Compute<State>::type;

  Shape shape;
  View<const State> x_t, noise, x0_prev;
  View<const Output> model_output;
  View<State> out, pred_xstart;
  bool reads_variance;
  T clip;
  const T* rows;
  int64_t num_rows;
  Index step;
  NoiseSource source;

  explicit ReverseStepKernel(const ReverseStep& a)
      : shape(shape_of(a.x_t)),
        x_t(view_of<const State>(a.x_t, shape)),
        noise(view_of<const State>(a.noise, shape)),
        x0_prev(view_of<const State>(a.x0_prev, shape)),
        model_output(view_of<const Output>(a.model_output, shape)),
        out(view_of<State>(a.out, shape)),
        pred_xstart(view_of<State>(a.pred_xstart, shape)),
        reads_variance(ddpm_fast::reads_variance(a)),
        clip(static_cast<T>(a.clip.value_or(std::numeric_limits<double>::infinity()))),
        rows(a.rows.const_data_ptr<T>()),
        num_rows(a.rows.size(0)),
        step(a.step),
        source{Index(a.seed), Index(a.sample_index)} {}

  DDPM_HOST_DEVICE StepRow<T> row(int64_t sample) const {
    return *reinterpret_cast<const StepRow<T>*>(rows + step[sample] * kRowLength);
  }
  DDPM_HOST_DEVICE bool draws_noise(const StepRow<T>& row) const {
    return source.present() && row.sigma != T(0);
  }
  DDPM_HOST_DEVICE bool reads_noise(const StepRow<T>& row) const {
    return noise.present() && row.sigma != T(0);
  }
};

// The forms of the op around a backend's run(const ReverseStepKernel<State, Output>&).
template <class Backend>
struct ReverseStepForms {
  static void launch(const ReverseStep& a) {
    if (a.x_t.numel() == 0) return;
    const c10::DeviceGuard guard(a.x_t.device());
    if (a.x_t.scalar_type() == at::kDouble) {
      return Backend::run(ReverseStepKernel<double, double>(a));
    }
    dispatch_narrow(a.x_t.scalar_type(), [&](auto state) {
      dispatch_narrow(a.model_output.scalar_type(), [&](auto output) {
        using State = typename decltype(state)::type;
        using Output = typename decltype(output)::type;
        Backend::run(ReverseStepKernel<State, Output>(a));
      });
    });
  }

  static Tensor functional(const Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                           const Tensor& step, const OptionalTensor& noise,
                           const OptionalTensor& seed, const OptionalTensor& sample_index,
                           const OptionalTensor& x0_prev, std::optional<double> clip) {
    check_inputs(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, clip);
    const Tensor out = at::empty_like(x_t);
    launch({x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, clip, out, {}});
    return out;
  }

  static void in_place(Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                       const Tensor& step, const OptionalTensor& noise, const OptionalTensor& seed,
                       const OptionalTensor& sample_index, const OptionalTensor& x0_prev,
                       std::optional<double> clip, const OptionalTensor& pred_xstart) {
    out(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, clip, x_t, pred_xstart);
  }

  static void out(const Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                  const Tensor& step, const OptionalTensor& noise, const OptionalTensor& seed,
                  const OptionalTensor& sample_index, const OptionalTensor& x0_prev,
                  std::optional<double> clip, const Tensor& out,
                  const OptionalTensor& pred_xstart) {
    check_inputs(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, clip);
    const ReverseStep a{x_t,          model_output, rows, step, noise,      seed,
                        sample_index, x0_prev,      clip, out,  pred_xstart};
    check_outputs(a);
    launch(a);
    mark_written(a.out);
    if (a.pred_xstart) mark_written(*a.pred_xstart);
  }
};

}  // namespace ddpm_fast
