// philox_normal and philox on CUDA.
#include "items.cuh"
#include "launch.h"

namespace ddpm_fast::cuda {
namespace {

struct PhiloxNormalBody {
  template <class Item>
  static constexpr int kBlocks = 1;

  template <class K, class Item>
  static DDPM_HOST_DEVICE void run(const K& k, const Item& item) {
    float noise[Item::kVec];
    draw_normals(k.source.key(item.sample, k.timestep[item.sample], k.stream), item, noise);
    item.store(k.out, noise);
  }
};

__global__ void __launch_bounds__(kThreads) philox_kernel(const PhiloxKernel kernel) {
  const int64_t call = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (call < kernel.calls) kernel.run(call);
}

}  // namespace

// The op makes its output, so that it is contiguous.
template <class State>
void launch(const PhiloxNormalKernel<State>& kernel, cudaStream_t stream) {
  constexpr int kLength = kVectorLength<State>;
  if (vectorises<kLength>(kernel.out, kernel.shape)) {
    run_items<PhiloxNormalBody, VectorItem<kLength, 1>>(kernel, stream);
  } else {
    run_items<PhiloxNormalBody, ElementItem>(kernel, stream);
  }
}

void launch(const PhiloxKernel& kernel, cudaStream_t stream) {
  const int64_t blocks = (kernel.calls + kThreads - 1) / kThreads;
  philox_kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(kernel);
}

template void launch(const PhiloxNormalKernel<double>&, cudaStream_t);
template void launch(const PhiloxNormalKernel<float>&, cudaStream_t);
template void launch(const PhiloxNormalKernel<c10::BFloat16>&, cudaStream_t);
template void launch(const PhiloxNormalKernel<c10::Half>&, cudaStream_t);

}  // namespace ddpm_fast::cuda
