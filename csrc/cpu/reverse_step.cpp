// reverse_step on the CPU: each block is staged, stepped and stored while it lies in the cache.
#include "../rerun.h"
#include "../reverse_step_op.h"
#include "blocks.h"

namespace ddpm_fast::cpu {
namespace {

struct ReverseStepBlock {
  template <class K>
  static DDPM_INLINE void run(const K& k, const Block& block) {
    using T = typename K::T;
    const int64_t pixels = k.shape.pixels;
    // Copies, as what is written below might else be thought to change them.
    const StepRow<T> row = k.row(k.step[block.sample]);
    const T clip = k.clip_of(block.sample);
    T x_buffer[kBlock], out_buffer[kBlock], extra_buffer[kBlock], noise_buffer[kBlock];
    T xstart[kBlock], mean_buffer[kBlock];

    const T* x_t = load(k.x_t, block, pixels, x_buffer);
    const T* out = load(k.model_output, block, pixels, out_buffer);
    if (k.guidance.present()) {
      const T w = k.guidance.at(k.step[block.sample], block.sample);
      const T factor = k.factor_of(block.sample);
      const T* uncond = load(k.model_output, unconditional(k, block), pixels, extra_buffer);
      for (int i = 0; i < block.size; ++i) {
        out_buffer[i] = guide(w, out[i], uncond[i]) * factor;
      }
      out = out_buffer;
    }
    T* mean = target(k.out, block, pixels, mean_buffer);
    if (is_usual(row) && !k.pred_xstart.present() && !k.threshold.present()) {
      DDPM_INDEPENDENT
      for (int i = 0; i < block.size; ++i) {
        const T predicted = predict_xstart<true>(row, x_t[i], out[i], clip);
        mean[i] = step_mean<true>(row, predicted, x_t[i], out[i]);
      }
    } else {
      DDPM_INDEPENDENT
      for (int i = 0; i < block.size; ++i) {
        xstart[i] = predict_xstart(row, x_t[i], out[i], clip);
      }
      if (k.threshold.present()) {
        for (int i = 0; i < block.size; ++i) xstart[i] /= clip;
      }
      DDPM_INDEPENDENT
      for (int i = 0; i < block.size; ++i) {
        mean[i] = step_mean(row, xstart[i], x_t[i], out[i]);
      }
    }
    if (k.x0_prev.present()) {
      const T* x0_prev = load(k.x0_prev, block, pixels, extra_buffer);
      for (int i = 0; i < block.size; ++i) mean[i] += term(row.mean_from_x0_prev, x0_prev[i]);
    }
    if (k.pred_xstart.present()) store(k.pred_xstart, block, pixels, xstart);
    const T* noise = nullptr;
    if (k.draws_noise(row)) {
      draw_normals(k.noise_key(block.sample, row), block, k.shape, noise_buffer, k.x_t,
                   k.model_output, k.out);
      noise = noise_buffer;
    } else if (k.reads_noise(row)) {
      noise = load(k.noise, block, pixels, noise_buffer);
    }
    if (noise != nullptr && row.sigma != T(0)) add_noise(k, row, block, noise, extra_buffer, mean);
    if (k.known.present()) {
      const T* known = load(k.known, block, pixels, x_buffer);
      const T* mask = load(k.mask, block, pixels, out_buffer);
      for (int i = 0; i < block.size; ++i) {
        const T z = noise == nullptr ? T(0) : noise[i];
        const T kept = term(row.known_from_x0, known[i]) + term(row.known_sigma, z);
        mean[i] = keep_known(mask[i], kept, mean[i]);
      }
    }
    store(k.out, block, pixels, mean);
    if constexpr (!std::is_same_v<T, typename K::State>) {
      if (k.next_input.present()) load(k.out, block, pixels, mean);
    }
    for (int64_t copy = 0; copy < k.next_input_copies; ++copy) {
      const Block there{block.sample + copy * k.shape.samples, block.first, block.size};
      k.next_input.template visit<T>([&](const auto& view)
                                         DDPM_LAMBDA_INLINE { store(view, there, pixels, mean); });
    }
  }

  template <class K>
  static DDPM_INLINE Block unconditional(const K& k, const Block& block) {
    return {block.sample + k.shape.samples, block.first, block.size};
  }

  template <class K, class T>
  static DDPM_INLINE void add_noise(const K& k, const StepRow<T>& row, const Block& block,
                                    const T* noise, T* variance_buffer, T* mean) {
    if (!k.reads_variance) {
      for (int i = 0; i < block.size; ++i) mean[i] += row.sigma * noise[i];
      return;
    }
    const T* v = load(k.model_output, block, k.shape.pixels, variance_buffer, k.shape.elements());
    for (int i = 0; i < block.size; ++i) mean[i] += learned_stddev(row, v[i]) * noise[i];
  }
};

struct Backend {
  template <class K>
  static void run(const K& kernel) {
    for_each_block<ReverseStepBlock>(kernel);
    for (int64_t sample = 0; sample < kernel.shape.samples; ++sample) kernel.advance(sample);
  }
};

using Forms = ReverseStepForms<Backend>;

const RerunRegistration rerun(c10::kCPU, &Forms::prepare);

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("reverse_step", &Forms::functional);
  m.impl("reverse_step_", &Forms::in_place);
  m.impl("reverse_step.out", &Forms::out);
}

}  // namespace ddpm_fast::cpu
