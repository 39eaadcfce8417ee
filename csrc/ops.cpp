// The schemas of the ops; csrc/cpu and csrc/cuda register their kernels. What each op computes is
// specified by ddpm_fast/reference.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "philox.h"

#if defined(WITH_CUDA)
#include <cuda.h>
#endif

TORCH_LIBRARY(ddpm_fast, m) {
  m.def(
      "reverse_step(Tensor x_t, Tensor model_output, Tensor rows, Tensor step, Tensor? noise, "
      "Tensor? seed, Tensor? sample_index, Tensor? x0_prev, Tensor? guidance_scale, float? clip) "
      "-> Tensor");
  m.def(
      "reverse_step_(Tensor(a!) x_t, Tensor model_output, Tensor rows, Tensor step, "
      "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? x0_prev, "
      "Tensor? guidance_scale, float? clip, Tensor(b!)? pred_xstart, Tensor(c!)? next_input, "
      "Tensor(d!)? next_step, Tensor(e!)? next_t) -> ()");
  m.def(
      "reverse_step.out(Tensor x_t, Tensor model_output, Tensor rows, Tensor step, "
      "Tensor? noise, Tensor? seed, Tensor? sample_index, Tensor? x0_prev, "
      "Tensor? guidance_scale, float? clip, Tensor(a!) out, Tensor(b!)? pred_xstart, "
      "Tensor(c!)? next_input, Tensor(d!)? next_step, Tensor(e!)? next_t) -> ()");
  m.def("q_sample(Tensor x_start, Tensor t, Tensor rows, Tensor noise) -> Tensor");
  m.def(
      "q_sample.drawn(Tensor x_start, Tensor t, Tensor rows, Tensor seed, Tensor sample_index) "
      "-> (Tensor, Tensor)");
  m.def(
      "q_sample.out(Tensor x_start, Tensor t, Tensor rows, Tensor? noise, Tensor? seed, "
      "Tensor? sample_index, Tensor(a!) x_t, Tensor(b!)? drawn_noise) -> ()");
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of ddpm_fast; importing it registers torch.ops.ddpm_fast.";
  m.def("build_info", &build_info, "What the extension was compiled against and with.");
}
