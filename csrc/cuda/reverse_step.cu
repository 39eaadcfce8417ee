// reverse_step on CUDA: one pass, the noise in registers, nothing read back to the host.
#include <c10/macros/Macros.h>

#include "items.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

// Without history, guidance, a learned variance or more to write than x_prev, and with noise drawn
// in the kernel: so common that it has a kernel of its own, in which nothing asks for any of these.
template <class K>
bool is_plain(const K& k) {
  return k.source.present() && !k.reads_variance && !k.x0_prev.present() && !k.guidance.present() &&
         !k.pred_xstart.present() && !k.next_input.present();
}

template <bool kPlain>
struct ReverseStepBody {
  static constexpr int kVectors = kPlain ? 2 : 1;

  template <class K, class Item>
  static DDPM_HOST_DEVICE void run(const K& k, const Item& item) {
    using T = typename K::T;
    typename K::State x_t[Item::kVec];
    typename K::Output output[Item::kVec];
    T x[Item::kVec], out[Item::kVec], noise[Item::kVec];

    // What is loaded here is under way, and not yet asked for, until the noise is ready.
    const int64_t step = k.step[item.sample];
    item.load(k.x_t, x_t);
    item.load(k.model_output, output);
    CUDA_KERNEL_ASSERT(static_cast<uint64_t>(step) < static_cast<uint64_t>(k.num_rows) &&
                       "reverse_step: step is out of range");
    const StepRow<T> row = k.row(step);
    // Without a choice here, the row is read at once; a sigma of 0 adds nothing anyway.
    const bool noisy = kPlain || k.draws_noise(row) || k.reads_noise(row);
    if (noisy) take_noise(k, item, row, noise);

#pragma unroll
    for (int i = 0; i < Item::kVec; ++i) {
      x[i] = static_cast<T>(x_t[i]);
      out[i] = static_cast<T>(output[i]);
    }
    if (!kPlain && k.guidance.present()) guide_output(k, item, step, out);
    is_usual(row) ? take_step<true>(k, item, row, out, x) : take_step<false>(k, item, row, out, x);
    if (noisy) add_noise(k, item, row, noise, x);
    item.store(k.out, x);
    if (!kPlain && k.next_input.present()) store_next_input(k, item, x);
    if (item.first == 0) k.advance(item.sample);
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void take_noise(const K& k, const Item& item, const StepRow<T>& row,
                                          T (&noise)[kVec]) {
    if (kPlain || k.source.present()) {
      const auto timestep = static_cast<int64_t>(row.timestep);
      draw_normals(k.source.key(item.sample, timestep, kReverse), item, noise);
    } else {
      item.load(k.noise, noise);
    }
  }

  // x_t becomes the mean of x_prev.
  template <bool kUsual, class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void take_step(const K& k, const Item& item, const StepRow<T>& row,
                                         const T (&out)[kVec], T (&x)[kVec]) {
    T xstart[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      xstart[i] = predict_xstart<kUsual>(row, x[i], out[i], k.clip);
      x[i] = step_mean<kUsual>(row, xstart[i], x[i], out[i]);
    }
    if (!kPlain && k.x0_prev.present()) add_history(k, item, row, x);
    if (!kPlain && k.pred_xstart.present()) item.store(k.pred_xstart, xstart);
  }

  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void guide_output(const K& k, Item item, int64_t step, T (&out)[kVec]) {
    const T w = k.guidance.at(step, item.sample);
    T uncond[kVec];
    item.sample += k.shape.samples;
    item.load(k.model_output, uncond);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = guide(w, out[i], uncond[i]);
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

  // The network reads what the state holds, rounded to the state's type.
  template <class K, class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void store_next_input(const K& k, Item item, T (&x)[kVec]) {
#pragma unroll
    for (T& value : x) value = static_cast<T>(static_cast<typename K::State>(value));
    for (int64_t copy = 0; copy < k.next_input_copies; ++copy) {
      store_any(k.next_input, item, x);
      item.sample += k.shape.samples;
    }
  }

  template <class Item, class T, int kVec>
  static DDPM_HOST_DEVICE void store_any(const AnyView& view, const Item& item,
                                         const T (&x)[kVec]) {
    if constexpr (std::is_same_v<T, double>) {
      item.store(view.as<double>(), x);
    } else {
      switch (view.dtype) {
        case Dtype::kBFloat16:
          return item.store(view.as<c10::BFloat16>(), x);
        case Dtype::kFloat16:
          return item.store(view.as<c10::Half>(), x);
        default:
          return item.store(view.as<float>(), x);
      }
    }
  }
};

}  // namespace

template <class State, class Output>
void launch(const ReverseStepKernel<State, Output>& k, cudaStream_t stream) {
  const auto run = [&](auto body) {
    for_each_item<decltype(body), State>(k, stream, k.x_t, k.model_output, k.noise, k.x0_prev,
                                         k.out, k.pred_xstart, k.next_input);
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
