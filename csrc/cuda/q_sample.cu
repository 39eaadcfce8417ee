// q_sample on CUDA.
#include <c10/macros/Macros.h>

#include "items.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

struct QSampleBody {
  template <class State>
  static constexpr int kVectors = 1;
  template <class Item>
  static constexpr int kBlocks = 1;

  template <class K, class Item>
  static DDPM_HOST_DEVICE void run(const K& k, const Item& item) {
    using State = typename K::State;
    using T = typename K::T;
    T x[Item::kVec], noise[Item::kVec];

    const int64_t t = k.t[item.sample];
    item.load(k.x_start, x);
    if (k.given_noise.present()) item.load(k.given_noise, noise);
    CUDA_KERNEL_ASSERT(0 <= t && t < k.num_rows && "q_sample: t is out of range");
    if (k.source.present()) {
      draw_normals(k.source.key(item.sample, t, kForward), item, noise);
      // x_t must hold the noise that is returned, so what rounds the one rounds the other.
#pragma unroll
      for (T& z : noise) z = static_cast<T>(static_cast<State>(z));
      item.store(k.drawn_noise, noise);
    }
    const T signal = k.signal(item.sample), scale = k.scale(item.sample);
#pragma unroll
    for (int i = 0; i < Item::kVec; ++i) x[i] = signal * x[i] + scale * noise[i];
    item.store(k.x_t, x);
  }
};

}  // namespace

template <class State>
void launch(const QSampleKernel<State>& k, cudaStream_t stream) {
  for_each_item<QSampleBody, State>(k, stream, k.x_start, k.given_noise, k.drawn_noise, k.x_t);
}

template void launch(const QSampleKernel<double>&, cudaStream_t);
template void launch(const QSampleKernel<float>&, cudaStream_t);
template void launch(const QSampleKernel<c10::BFloat16>&, cudaStream_t);
template void launch(const QSampleKernel<c10::Half>&, cudaStream_t);

}  // namespace ddpm_fast::cuda
