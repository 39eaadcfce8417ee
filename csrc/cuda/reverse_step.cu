// reverse_step on CUDA: one pass, the noise in registers, nothing read back to the host.
#include "../reverse_step.h"
#include "items.cuh"

namespace ddpm_fast::cuda {
namespace {

struct ReverseStepItem {
  template <bool kVectorised, int kVec, class K>
  static __device__ __forceinline__ void run(const K& k, const Item& item) {
    using T = typename K::T;
    const int64_t pixels = k.shape.pixels, step = k.step[item.sample];
    CUDA_KERNEL_ASSERT(0 <= step && step < k.num_rows && "reverse_step: step is out of range");
    const StepRow<T> row = k.row(item.sample);
    T x[kVec], out[kVec], extra[kVec], noise[kVec], xstart[kVec];

    load<kVectorised>(k.x_t, item, pixels, x);
    load<kVectorised>(k.model_output, item, pixels, out);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      xstart[i] = predict_xstart(row, x[i], out[i], k.clip);
      x[i] = step_mean(row, xstart[i], x[i], out[i]);
    }
    if (k.x0_prev.present()) {
      load<kVectorised>(k.x0_prev, item, pixels, extra);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] += term(row.mean_from_x0_prev, extra[i]);
    }
    if (k.pred_xstart.present()) store<kVectorised>(k.pred_xstart, item, pixels, xstart);
    if (k.draws_noise(row)) {
      draw_normals(k.source.key(item.sample, static_cast<int64_t>(row.timestep), kReverse), item,
                   noise);
    } else if (k.reads_noise(row)) {
      load<kVectorised>(k.noise, item, pixels, noise);
    } else {
      return store<kVectorised>(k.out, item, pixels, x);
    }
    if (k.reads_variance) {
      load<kVectorised>(k.model_output, item, pixels, extra, k.shape.elements());
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] += learned_stddev(row, extra[i]) * noise[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] += row.sigma * noise[i];
    }
    store<kVectorised>(k.out, item, pixels, x);
  }
};

struct Backend {
  template <class K>
  static void run(const K& k) {
    constexpr int kVec = vector_length<typename K::State>();
    const bool vectorised =
        vectorises<kVec>(k.x_t, k.shape) && vectorises<kVec>(k.model_output, k.shape) &&
        vectorises<kVec>(k.noise, k.shape) && vectorises<kVec>(k.x0_prev, k.shape) &&
        vectorises<kVec>(k.out, k.shape) && vectorises<kVec>(k.pred_xstart, k.shape);
    for_each_item<ReverseStepItem, kVec>(k, vectorised);
  }
};

using Forms = ReverseStepForms<Backend>;

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("reverse_step", &Forms::functional);
  m.impl("reverse_step_", &Forms::in_place);
  m.impl("reverse_step.out", &Forms::out);
}

}  // namespace ddpm_fast::cuda
