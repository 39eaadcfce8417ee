// q_sample on CUDA.
#include "../q_sample.h"
#include "items.cuh"

namespace ddpm_fast::cuda {
namespace {

struct QSampleItem {
  template <bool kVectorised, int kVec, class K>
  static __device__ __forceinline__ void run(const K& k, const Item& item) {
    using State = typename K::State;
    using T = typename K::T;
    const int64_t pixels = k.shape.pixels, t = k.t[item.sample];
    CUDA_KERNEL_ASSERT(0 <= t && t < k.num_rows && "q_sample: t is out of range");
    const T signal = k.signal(item.sample), scale = k.scale(item.sample);
    T x[kVec], noise[kVec];

    load<kVectorised>(k.x_start, item, pixels, x);
    if (k.source.present()) {
      draw_normals(k.source.key(item.sample, t, kForward), item, noise);
      // x_t must hold the noise that is returned, so what rounds the one rounds the other.
#pragma unroll
      for (int i = 0; i < kVec; ++i) noise[i] = static_cast<T>(static_cast<State>(noise[i]));
      store<kVectorised>(k.drawn_noise, item, pixels, noise);
    } else {
      load<kVectorised>(k.given_noise, item, pixels, noise);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = signal * x[i] + scale * noise[i];
    store<kVectorised>(k.x_t, item, pixels, x);
  }
};

struct Backend {
  template <class K>
  static void run(const K& k) {
    constexpr int kVec = vector_length<typename K::State>();
    const bool vectorised =
        vectorises<kVec>(k.x_start, k.shape) && vectorises<kVec>(k.given_noise, k.shape) &&
        vectorises<kVec>(k.drawn_noise, k.shape) && vectorises<kVec>(k.x_t, k.shape);
    for_each_item<QSampleItem, kVec>(k, vectorised);
  }
};

using Forms = QSampleForms<Backend>;

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("q_sample", &Forms::given);
  m.impl("q_sample.drawn", &Forms::drawn);
}

}  // namespace ddpm_fast::cuda
