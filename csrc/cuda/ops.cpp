// The ops on CUDA: each queues one kernel on the current stream and reads nothing back.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../philox_normal_op.h"
#include "../q_sample_op.h"
#include "../rerun.h"
#include "../reverse_step_op.h"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

struct Backend {
  template <class Kernel>
  static void run(const Kernel& kernel) {
    const Shape& shape = kernel.shape;
    TORCH_CHECK_VALUE(shape.samples <= kMostSamples && shape.elements() <= kMostElements,
                      "on CUDA, a batch must have at most ", text(kMostSamples),
                      " samples of at most ", text(kMostElements), " elements; got ",
                      text(shape.samples), " of ", text(shape.elements()));
    queue(kernel);
  }
  static void run(const PhiloxKernel& kernel) { queue(kernel); }

  template <class Kernel>
  static void queue(const Kernel& kernel) {
    launch(kernel, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

const RerunRegistration rerun(c10::kCUDA, &ReverseStepForms<Backend>::prepare);

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("reverse_step", &ReverseStepForms<Backend>::functional);
  m.impl("reverse_step_", &ReverseStepForms<Backend>::in_place);
  m.impl("reverse_step.out", &ReverseStepForms<Backend>::out);
  m.impl("q_sample", &QSampleForms<Backend>::given);
  m.impl("q_sample.drawn", &QSampleForms<Backend>::drawn);
  m.impl("q_sample.out", &QSampleForms<Backend>::out);
  m.impl("philox_normal", &PhiloxForms<Backend>::normal);
  m.impl("philox", &PhiloxForms<Backend>::words);
}

}  // namespace ddpm_fast::cuda
