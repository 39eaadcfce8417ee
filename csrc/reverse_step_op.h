// reverse_step: its arguments, their checks, and the three forms of the op, for every backend.
//
//   functional  x_prev = reverse_step(x_t, model_output, rows, step, ...)
//   in place    reverse_step_(x_t, ...)            x_prev over x_t
//   out         reverse_step.out(..., out=)        x_prev into out
//
// The last two also write, where a tensor for it is given, pred_xstart and what the network and the
// kernel are to be called with next.
#pragma once

#include "checks.h"
#include "dispatch.h"
#include "reverse_step.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <functional>
#include <limits>
#include <string_view>

namespace ddpm_fast {

struct ReverseStep {
  const Tensor &x_t, &model_output, &rows, &step;
  const OptionalTensor &noise, &seed, &sample_index, &x0_prev, &guidance_scale, &guidance_factor;
  const OptionalTensor &threshold, &known, &mask;
  const std::optional<double>& clip;
  const Tensor& out;
  const OptionalTensor &pred_xstart, &next_input, &next_step, &next_t;
};

inline void check_inputs(const Tensor& x, const Tensor& output, const Tensor& rows,
                         const Tensor& step, const OptionalTensor& noise,
                         const OptionalTensor& seed, const OptionalTensor& sample_index,
                         const OptionalTensor& x0_prev, const OptionalTensor& guidance_scale,
                         const OptionalTensor& guidance_factor, const OptionalTensor& threshold,
                         const OptionalTensor& known, const OptionalTensor& mask,
                         const std::optional<double>& clip) {
  const char* op = "reverse_step";
  const Argument x_t{op, "x_t", x}, model_output{op, "model_output", output};
  check_floating(x_t);
  check_batch(x_t);
  check_layout(x_t);

  check_floating(model_output);
  check_both_double(model_output, x_t);
  check_device(model_output, x_t);
  check_output_shape(model_output, x_t, guidance_scale.has_value());
  check_layout(model_output);

  check_rows({op, "rows", rows}, x_t, kRowLength);
  check_index({op, "step", step}, x_t, true);
  check_range({op, "step", step}, {op, "rows", rows});
  check_noise_source(x_t, noise, seed, sample_index);
  TORCH_CHECK_VALUE(known.has_value() == mask.has_value(), op,
                    ": known and mask must be given together");
  if (noise) check_like({op, "noise", *noise}, x_t);
  if (x0_prev) check_like({op, "x0_prev", *x0_prev}, x_t);
  if (known) check_like({op, "known", *known}, x_t);
  if (mask) check_like({op, "mask", *mask}, x_t);
  if (guidance_scale) {
    check_scale({op, "guidance_scale", *guidance_scale}, x_t, {op, "rows", rows});
  }
  TORCH_CHECK_VALUE(guidance_scale || !guidance_factor, op,
                    ": guidance_factor needs a guidance_scale");
  if (guidance_factor) check_per_sample({op, "guidance_factor", *guidance_factor}, x_t);
  if (threshold) check_per_sample({op, "threshold", *threshold}, x_t);
  TORCH_CHECK_VALUE(!(clip && threshold), op, ": give clip or threshold, not both");
  TORCH_CHECK_VALUE(!clip || *clip > 0, op, ": clip must be positive, or None; got ", text(*clip));
}

// A step in place, of a network that may return its own input, and a history that moves on.
inline bool may_be_the_same(std::string_view written, std::string_view other) {
  return (written == "out" && (other == "x_t" || other == "model_output")) ||
         (written == "pred_xstart" && other == "x0_prev");
}

inline void check_outputs(const ReverseStep& a) {
  const char* op = "reverse_step";
  check_carry_no_gradient(
      op, {&a.x_t, &a.model_output, &a.out, address_of(a.noise), address_of(a.x0_prev),
           address_of(a.known), address_of(a.pred_xstart), address_of(a.next_input)});
  struct Named {
    const char* name;
    const Tensor* tensor;
  };
  const Argument x_t{op, "x_t", a.x_t};
  const Named written[] = {{"out", &a.out},
                           {"pred_xstart", address_of(a.pred_xstart)},
                           {"next_input", address_of(a.next_input)}};
  const Named read[] = {{"x_t", &a.x_t},
                        {"model_output", &a.model_output},
                        {"noise", address_of(a.noise)},
                        {"x0_prev", address_of(a.x0_prev)},
                        {"known", address_of(a.known)},
                        {"mask", address_of(a.mask)}};
  for (const Named& w : written) {
    if (w.tensor == nullptr) continue;
    const Argument argument{op, w.name, *w.tensor};
    w.tensor == address_of(a.next_input) ? check_next_input(argument, x_t)
                                         : check_output(argument, x_t);
    const auto check_apart_from = [&](const Named& other) {
      if (other.tensor == nullptr) return;
      check_no_overlap(argument, {op, other.name, *other.tensor},
                       may_be_the_same(w.name, other.name));
    };
    for (const Named& other : read) check_apart_from(other);
    for (const Named* earlier = written; earlier != &w; ++earlier) check_apart_from(*earlier);
  }
}

inline void check_next(const ReverseStep& a) {
  const char* op = "reverse_step";
  const auto check_apart_from = [&](const Argument& written, const char* name,
                                    const Tensor* other) {
    if (other != nullptr) check_no_overlap(written, {op, name, *other}, false);
  };
  const auto check_apart_from_read = [&](const Argument& written) {
    check_apart_from(written, "step", &a.step);
    check_apart_from(written, "seed", address_of(a.seed));
    check_apart_from(written, "sample_index", address_of(a.sample_index));
  };
  if (a.next_step) {
    const Argument next_step{op, "next_step", *a.next_step};
    check_next_step(next_step, {op, "step", a.step}, {op, "x_t", a.x_t});
    check_apart_from_read(next_step);
  }
  if (a.next_t) {
    const Argument next_t{op, "next_t", *a.next_t};
    check_next_t(next_t, {op, "x_t", a.x_t});
    check_apart_from_read(next_t);
    check_apart_from(next_t, "next_step", address_of(a.next_step));
  }
}

inline void mark_written(const ReverseStep& a) {
  mark_written(a.out);
  for (const OptionalTensor* written : {&a.pred_xstart, &a.next_input, &a.next_step, &a.next_t}) {
    if (*written) mark_written(**written);
  }
}

template <class T>
GuidanceScale<T> guidance_of(const OptionalTensor& scale) {
  if (!scale) return {};
  return {scale->const_data_ptr<T>(), scale->size(0) == 1 ? 0 : scale->stride(0),
          scale->size(1) == 1 ? 0 : scale->stride(1)};
}

template <class T>
PerSample<T> per_sample_of(const OptionalTensor& numbers) {
  if (!numbers) return {};
  return {numbers->const_data_ptr<T>(), numbers->stride(0)};
}

inline Next next_of(const ReverseStep& a) {
  Next next;
  if (a.next_step) {
    next.step = a.next_step->mutable_data_ptr<int64_t>();
    next.step_stride = a.next_step->dim() == 0 ? 0 : a.next_step->stride(0);
  }
  if (a.next_t) {
    next.t = a.next_t->mutable_data_ptr<int64_t>();
    next.t_stride = a.next_t->stride(0);
    next.twice = a.next_t->size(0) != a.x_t.size(0);
  }
  return next;
}

template <class State, class Output>
ReverseStepKernel<State, Output> kernel_of(const ReverseStep& a) {
  using T = compute_t<State>;
  const Shape shape = shape_of(a.x_t);
  const double clip = a.clip.value_or(std::numeric_limits<double>::infinity());
  return {
      shape,
      view_of<const State>(a.x_t, shape),
      view_of<const State>(a.noise, shape),
      view_of<const State>(a.x0_prev, shape),
      view_of<const State>(a.known, shape),
      view_of<const State>(a.mask, shape),
      view_of<const Output>(a.model_output, shape),
      view_of<State>(a.out, shape),
      view_of<State>(a.pred_xstart, shape),
      any_view_of(a.next_input, shape),
      a.next_input ? a.next_input->size(0) / a.x_t.size(0) : 0,
      a.model_output.size(1) != a.x_t.size(1),
      static_cast<T>(clip),
      a.rows.const_data_ptr<T>(),
      a.rows.size(0),
      index_of(a.step),
      guidance_of<T>(a.guidance_scale),
      per_sample_of<T>(a.guidance_factor),
      per_sample_of<T>(a.threshold),
      {index_of(a.seed), index_of(a.sample_index)},
      next_of(a),
  };
}

// Calls f with the kernel for the dtypes of a step.
template <class F>
void with_kernel_of(const ReverseStep& a, const F& f) {
  if (a.x_t.scalar_type() == at::kDouble) return f(kernel_of<double, double>(a));
  dispatch_narrow(a.x_t.scalar_type(), [&](auto state) {
    dispatch_narrow(a.model_output.scalar_type(), [&](auto output) {
      using State = typename decltype(state)::type;
      using Output = typename decltype(output)::type;
      f(kernel_of<State, Output>(a));
    });
  });
}

// Runs a step's kernel on an output that lies elsewhere.
using RunOn = std::function<void(const void* model_output)>;

// The forms of the op around a backend's run(const ReverseStepKernel<State, Output>&).
template <class Backend>
struct ReverseStepForms {
  static void launch(const ReverseStep& a) {
    if (a.x_t.numel() == 0) return;
    const c10::DeviceGuard guard(a.x_t.device());
    with_kernel_of(a, [](const auto& kernel) { Backend::run(kernel); });
  }

  // The same again on other outputs of that type and layout, see csrc/rerun.h.
  static RunOn prepare(const ReverseStep& a) {
    RunOn run_on;
    with_kernel_of(a, [&](auto kernel) {
      run_on = [kernel, device = a.x_t.device()](const void* model_output) mutable {
        using Output = typename decltype(kernel)::Output;
        c10::OptionalDeviceGuard guard;
        if (!device.is_cpu()) guard.reset_device(device);  // the question alone takes a while
        kernel.model_output.data = static_cast<const Output*>(model_output);
        Backend::run(kernel);
      };
    });
    return run_on;
  }

  static Tensor functional(const Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                           const Tensor& step, const OptionalTensor& noise,
                           const OptionalTensor& seed, const OptionalTensor& sample_index,
                           const OptionalTensor& x0_prev, const OptionalTensor& guidance_scale,
                           const OptionalTensor& guidance_factor, const OptionalTensor& threshold,
                           const OptionalTensor& known, const OptionalTensor& mask,
                           std::optional<double> clip) {
    check_inputs(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, guidance_scale,
                 guidance_factor, threshold, known, mask, clip);
    const Tensor out = at::empty_like(x_t);
    launch({x_t,
            model_output,
            rows,
            step,
            noise,
            seed,
            sample_index,
            x0_prev,
            guidance_scale,
            guidance_factor,
            threshold,
            known,
            mask,
            clip,
            out,
            {},
            {},
            {},
            {}});
    return out;
  }

  static void in_place(Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                       const Tensor& step, const OptionalTensor& noise, const OptionalTensor& seed,
                       const OptionalTensor& sample_index, const OptionalTensor& x0_prev,
                       const OptionalTensor& guidance_scale, const OptionalTensor& guidance_factor,
                       const OptionalTensor& threshold, const OptionalTensor& known,
                       const OptionalTensor& mask, std::optional<double> clip,
                       const OptionalTensor& pred_xstart, const OptionalTensor& next_input,
                       const OptionalTensor& next_step, const OptionalTensor& next_t) {
    out(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, guidance_scale,
        guidance_factor, threshold, known, mask, clip, x_t, pred_xstart, next_input, next_step,
        next_t);
  }

  static void out(const Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                  const Tensor& step, const OptionalTensor& noise, const OptionalTensor& seed,
                  const OptionalTensor& sample_index, const OptionalTensor& x0_prev,
                  const OptionalTensor& guidance_scale, const OptionalTensor& guidance_factor,
                  const OptionalTensor& threshold, const OptionalTensor& known,
                  const OptionalTensor& mask, std::optional<double> clip, const Tensor& out,
                  const OptionalTensor& pred_xstart, const OptionalTensor& next_input,
                  const OptionalTensor& next_step, const OptionalTensor& next_t) {
    check_inputs(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, guidance_scale,
                 guidance_factor, threshold, known, mask, clip);
    const ReverseStep a{x_t,         model_output, rows,      step,           noise,
                        seed,        sample_index, x0_prev,   guidance_scale, guidance_factor,
                        threshold,   known,        mask,      clip,           out,
                        pred_xstart, next_input,   next_step, next_t};
    check_outputs(a);
    check_next(a);
    launch(a);
    mark_written(a);
  }
};

}  // namespace ddpm_fast
