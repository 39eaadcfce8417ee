// The schemas of the ops; csrc/cpu and csrc/cuda register their kernels. What each op computes is
// specified by ddpm_fast/reference.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <optional>
#include <string>

#include "philox.h"
#include "rerun.h"

#if defined(WITH_CUDA)
#include <cuda.h>
#endif

TORCH_LIBRARY(ddpm_fast, m) {
  m.def(
      "reverse_step(Tensor x_t, Tensor model_output, Tensor rows, Tensor step, Tensor? noise, "
      "Tensor? seed, Tensor? sample_index, Tensor? x0_prev, Tensor? guidance_scale, "
      "Tensor? guidance_factor, Tensor? threshold, Tensor? known, Tensor? mask, float? clip) "
      "-> Tensor");
  m.def(
      "reverse_step_(Tensor(a!) x_t, Tensor model_output, Tensor rows, Tensor step, "
      "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? x0_prev, "
      "Tensor? guidance_scale, Tensor? guidance_factor, Tensor? threshold, Tensor? known, "
      "Tensor? mask, float? clip, Tensor(b!)? pred_xstart, Tensor(c!)? next_input, "
      "Tensor(d!)? next_step, Tensor(e!)? next_t) -> ()");
  m.def(
      "reverse_step.out(Tensor x_t, Tensor model_output, Tensor rows, Tensor step, "
      "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? x0_prev, "
      "Tensor? guidance_scale, Tensor? guidance_factor, Tensor? threshold, Tensor? known, "
      "Tensor? mask, float? clip, Tensor(a!) out, Tensor(b!)? pred_xstart, "
      "Tensor(c!)? next_input, Tensor(d!)? next_step, Tensor(e!)? next_t) -> ()");
  m.def("q_sample(Tensor x_start, Tensor t, Tensor rows, Tensor noise) -> Tensor");
  m.def(
      "q_sample.drawn(Tensor x_start, Tensor t, Tensor rows, Tensor seed, Tensor sample_index) "
      "-> (Tensor, Tensor)");
  m.def(
      "q_sample.out(Tensor x_start, Tensor t, Tensor rows, Tensor? noise, Tensor? seed, "
      "Tensor? sample_index, Tensor(a!) out, Tensor(b!)? noise_out) -> ()");
  m.def(
      "philox_normal(SymInt[] size, Tensor seed, Tensor sample_index, Tensor timestep, "
      "int stream, ScalarType dtype) -> Tensor");
  m.def("philox(Tensor counter, Tensor key) -> Tensor");
}

namespace {

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  const std::string compiler = "msvc " + std::to_string(_MSC_VER);
#else
  const std::string compiler = "unknown";
#endif
#if defined(WITH_CUDA)
  const std::string cuda =
      std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
  const std::string archs = DDPM_FAST_CUDA_ARCHS;
#else
  const std::string cuda, archs;
#endif
  return {{"torch", TORCH_VERSION},
          {"cuda", cuda},
          {"cuda_archs", archs},
          {"compiler", compiler},
          {"noise_layout", std::to_string(ddpm_fast::kNoiseLayoutVersion)}};
}

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// reverse_step_ straight through the dispatcher: what torch.ops does before it to that
// many arguments takes as long as the arithmetic of a small batch.
void reverse_step_in_place(Tensor& x_t, const Tensor& model_output, const Tensor& rows,
                           const Tensor& step, const OptionalTensor& noise,
                           const OptionalTensor& seed, const OptionalTensor& sample_index,
                           const OptionalTensor& x0_prev, const OptionalTensor& guidance_scale,
                           const OptionalTensor& guidance_factor, const OptionalTensor& threshold,
                           const OptionalTensor& known, const OptionalTensor& mask,
                           std::optional<double> clip, const OptionalTensor& pred_xstart,
                           const OptionalTensor& next_input, const OptionalTensor& next_step,
                           const OptionalTensor& next_t) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ddpm_fast::reverse_step_", "")
                             .typed<decltype(reverse_step_in_place)>();
  const py::gil_scoped_release no_gil;
  op.call(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev, guidance_scale,
          guidance_factor, threshold, known, mask, clip, pred_xstart, next_input, next_step,
          next_t);
}

// reverse_step_ with all but the model_output settled beforehand, and `ready` to make of what a
// network returned a tensor that the op can take.
struct BoundReverseStep {
  py::object ready;
  Tensor x_t, rows, step;
  OptionalTensor noise, seed, sample_index, x0_prev, guidance_scale, guidance_factor;
  OptionalTensor threshold, known, mask;
  std::optional<double> clip;
  OptionalTensor pred_xstart, next_input, next_step, next_t;
  ddpm_fast::Rerun rerun;

  ddpm_fast::ReverseStep on(const Tensor& model_output) const {
    return {x_t,         model_output, rows,      step,           noise,
            seed,        sample_index, x0_prev,   guidance_scale, guidance_factor,
            threshold,   known,        mask,      clip,           x_t,
            pred_xstart, next_input,   next_step, next_t};
  }

  void operator()(py::handle returned) {
    if (THPVariable_Check(returned.ptr())) {
      const auto a = on(THPVariable_Unpack(returned.ptr()));
      if (rerun.serves(a)) {
        const py::gil_scoped_release no_gil;
        return rerun(a);
      }
    }
    const auto model_output = ready(returned).cast<Tensor>();
    reverse_step_in_place(x_t, model_output, rows, step, noise, seed, sample_index, x0_prev,
                          guidance_scale, guidance_factor, threshold, known, mask, clip,
                          pred_xstart, next_input, next_step, next_t);
    rerun.remember(on(model_output));
  }
};

PyObject* call_bound_reverse_step(PyObject* self, PyObject* returned) {
  try {
    (*py::reinterpret_borrow<py::capsule>(self).get_pointer<BoundReverseStep>())(returned);
    Py_RETURN_NONE;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// A function of Python's own interface: pybind11 would take a microsecond to pass one argument on.
PyMethodDef bound_reverse_step_method{"bound_reverse_step", call_bound_reverse_step, METH_O,
                                      nullptr};

py::object bound_reverse_step(py::object ready, Tensor x_t, Tensor rows, Tensor step,
                              OptionalTensor noise, OptionalTensor seed,
                              OptionalTensor sample_index, OptionalTensor x0_prev,
                              OptionalTensor guidance_scale, OptionalTensor guidance_factor,
                              OptionalTensor threshold, OptionalTensor known, OptionalTensor mask,
                              std::optional<double> clip, OptionalTensor pred_xstart,
                              OptionalTensor next_input, OptionalTensor next_step,
                              OptionalTensor next_t) {
  const py::capsule self(
      new BoundReverseStep{ready, x_t, rows, step, noise, seed, sample_index, x0_prev,
                           guidance_scale, guidance_factor, threshold, known, mask, clip,
                           pred_xstart, next_input, next_step, next_t},
      [](void* bound) { delete static_cast<BoundReverseStep*>(bound); });
  PyObject* function = PyCFunction_New(&bound_reverse_step_method, self.ptr());
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of ddpm_fast; importing it registers torch.ops.ddpm_fast.";
  m.def("build_info", &build_info, "What the extension was compiled against and with.");
  m.def("reverse_step_", &reverse_step_in_place, "torch.ops.ddpm_fast.reverse_step_.");
  m.def("bound_reverse_step", &bound_reverse_step, "See ddpm_fast.ops.bound_reverse_step.");
}
