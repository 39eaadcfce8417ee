// philox_normal and philox on CUDA.
#include "../philox_normal.h"
#include "items.cuh"

namespace ddpm_fast::cuda {
namespace {

struct PhiloxNormalItem {
  template <bool kVectorised, int kVec, class K>
  static __device__ __forceinline__ void run(const K& k, const Item& item) {
    float noise[kVec];
    draw_normals(k.source.key(item.sample, k.timestep[item.sample], k.stream), item, noise);
    store<kVectorised>(k.out, item, k.shape.pixels, noise);
  }
};

__global__ void __launch_bounds__(kThreads) philox_kernel(const PhiloxKernel kernel) {
  const int64_t call = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (call < kernel.calls) kernel.run(call);
}

struct Backend {
  template <class State>
  static void run(const PhiloxNormalKernel<State>& k) {
    constexpr int kVec = vector_length<State>();
    for_each_item<PhiloxNormalItem, kVec>(k, vectorises<kVec>(k.out, k.shape));
  }
  static void run(const PhiloxKernel& kernel) {
    const int64_t blocks = (kernel.calls + kThreads - 1) / kThreads;
    philox_kernel<<<static_cast<unsigned int>(blocks), kThreads, 0,
                    c10::cuda::getCurrentCUDAStream()>>>(kernel);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

using Forms = PhiloxForms<Backend>;

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("philox_normal", &Forms::normal);
  m.impl("philox", &Forms::words);
}

}  // namespace ddpm_fast::cuda
