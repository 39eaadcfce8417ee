// reverse_step on CUDA: one pass, the noise in registers, nothing read back to the host.
#include <c10/macros/Macros.h>

#include "items.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

// Without history, guidance, a threshold, a mask, a learned variance or more to write than x_prev,
// and with noise drawn in the kernel: so common that it has a kernel of its own, in which nothing
// asks for any of these.
template <class K>
bool is_plain(const K& k) {
  return k.source.present() && !k.reads_variance && !k.x0_prev.present() && !k.guidance.present() &&
         !k.threshold.present() && !k.known.present() && !k.pred_xstart.present() &&
         !k.next_input.present();
}

template <bool kPlain>
struct ReverseStepBody {
  // As measured on an H200. What asks for more has no registers for four vectors of 16-bit numbers.
  template <class State>
  static constexpr int kVectors = sizeof(State) == 4 || (kPlain && sizeof(State) == 2) ? 4 : 1;
  template <class Item>
  static constexpr int kBlocks = kPlain ? (Item::kVec > 16 ? 4 : 6) : (Item::kVec == 16 ? 5 : 1);

  template <class K, class Item>
  static DDPM_HOST_DEVICE void run(const K& k, const Item& item) {
    const int64_t step = k.step[item.sample];
    // Under way, and not asked for until the noise is ready.
    typename K::State x_t[Item::kVec];
    typename K::Output output[Item::kVec];
    item.load(k.x_t, x_t);
    item.load(k.model_output, output);
    CUDA_KERNEL_ASSERT(static_cast<uint64_t>(step) < static_cast<uint64_t>(k.num_rows) &&
                       "reverse_step: step is out of range");
    const StepRow<typename K::T> row = k.row(step);
    is_usual(row) ? move_on<true>(k, item, step, row, x_t, output)
                  : move_on<false>(k, item, step, row, x_t, output);
    if (item.first == 0) k.advance(item.sample);
  }

  // From what has been loaded to x_prev.
  template <bool kUsual, class K, class Item, class T, class State, class Output, int kVec>
  static DDPM_HOST_DEVICE void move_on(const K& k, const Item& item, int64_t step,
                                       const StepRow<T>& row, const State (&x_t)[kVec],
                                       const Output (&output)[kVec]) {
    // Without a choice here, the row is read at once; a sigma of 0 adds nothing anyway.
    const bool draws = kPlain || k.draws_noise(row), noisy = draws || k.reads_noise(row);
    T x[kVec], out[kVec], noise[kVec];
    if (draws) {
      draw_normals(k.noise_key(item.sample, row), item, noise);
    } else if (noisy) {
      item.load(k.noise, noise);
    }
    convert(x_t, x);
    convert(output, out);
    if (!kPlain && k.guidance.present()) guide_output(k, item, step, out);
    take_step<kUsual>(k, item, row, out, x);
    if (kPlain || (noisy && row.sigma != T(0))) add_noise(k, item, row, noise, x);
    if (!kPlain && k.known.present()) restore_known(k, item, row, noisy, noise, x);
    item.store(k.out, x);
    if (!kPlain && k.next_input.present()) store_next_input(k, item, x);
  }

  // x_t becomes the mean of x_prev.
  template <bool kUsual, class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void take_step(const K& k, const Item& item, const StepRow<T>& row,
                                         const T (&out)[kVec], T (&x)[kVec]) {
    const bool thresholded = !kPlain && k.threshold.present();
    const T clip = thresholded ? k.threshold[item.sample] : k.clip;
    T xstart[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      xstart[i] = predict_xstart<kUsual>(row, x[i], out[i], clip);
      if (thresholded) xstart[i] /= clip;
      x[i] = step_mean<kUsual>(row, xstart[i], x[i], out[i]);
    }
    if (!kPlain && k.x0_prev.present()) add_history(k, item, row, x);
    if (!kPlain && k.pred_xstart.present()) item.store(k.pred_xstart, xstart);
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void guide_output(const K& k, Item item, int64_t step, T (&out)[kVec]) {
    const T w = k.guidance.at(step, item.sample), factor = k.factor_of(item.sample);
    T uncond[kVec];
    item.sample += k.shape.samples;
    item.load(k.model_output, uncond);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = guide(w, out[i], uncond[i]) * factor;
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void add_history(const K& k, const Item& item, const StepRow<T>& row,
                                           T (&x)[kVec]) {
    T x0_prev[kVec];
    item.load(k.x0_prev, x0_prev);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] += term(row.mean_from_x0_prev, x0_prev[i]);
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void add_noise(const K& k, const Item& item, const StepRow<T>& row,
                                         const T (&noise)[kVec], T (&x)[kVec]) {
    if (!kPlain && k.reads_variance) {
      T variance[kVec];
      item.in_variance(k.shape).load(k.model_output, variance);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] += learned_stddev(row, variance[i]) * noise[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] += row.sigma * noise[i];
    }
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void restore_known(const K& k, const Item& item, const StepRow<T>& row,
                                             bool noisy, const T (&noise)[kVec], T (&x)[kVec]) {
    T known[kVec], mask[kVec];
    item.load(k.known, known);
    item.load(k.mask, mask);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const T z = noisy ? noise[i] : T(0);
      const T kept = term(row.known_from_x0, known[i]) + term(row.known_sigma, z);
      x[i] = keep_known(mask[i], kept, x[i]);
    }
  }

  // The network reads what the state holds, rounded to the state's type.
  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void store_next_input(const K& k, Item item, T (&x)[kVec]) {
#pragma unroll
    for (T& value : x) value = static_cast<T>(static_cast<typename K::State>(value));
    for (int64_t copy = 0; copy < k.next_input_copies; ++copy) {
      k.next_input.template visit<T>([&](const auto& view) { item.store(view, x); });
      item.sample += k.shape.samples;
    }
  }
};

}  // namespace

template <class State, class Output>
void launch(const ReverseStepKernel<State, Output>& k, cudaStream_t stream) {
  const auto run = [&](auto body) {
    for_each_item<decltype(body), State>(k, stream, k.x_t, k.model_output, k.noise, k.x0_prev,
                                         k.known, k.mask, k.out, k.pred_xstart, k.next_input);
  };
  is_plain(k) ? run(ReverseStepBody<true>{}) : run(ReverseStepBody<false>{});
}

template void launch(const ReverseStepKernel<double, double>&, cudaStream_t);
template void launch(const ReverseStepKernel<float, float>&, cudaStream_t);
template void launch(const ReverseStepKernel<float, c10::BFloat16>&, cudaStream_t);
template void launch(const ReverseStepKernel<float, c10::Half>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::BFloat16, float>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::BFloat16, c10::BFloat16>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::BFloat16, c10::Half>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::Half, float>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::Half, c10::BFloat16>&, cudaStream_t);
template void launch(const ReverseStepKernel<c10::Half, c10::Half>&, cudaStream_t);

}  // namespace ddpm_fast::cuda
