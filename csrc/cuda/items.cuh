// A batch is cut into items of kVec consecutive elements of one sample, in logical order, an item
// a thread: 16-byte accesses for float, and for types of half the size with kVec doubled. Where a
// tensor's layout does not allow whole vectors, the same item is read element by element.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <ATen/cuda/detail/IntegerDivider.cuh>

#include <algorithm>

#include "../layout.h"
#include "../philox.h"

namespace ddpm_fast::cuda {

constexpr int kThreads = 256;

// Item numbers stay below 2^31, so that a cheap 32-bit division finds an item's sample.
constexpr int64_t kMaxItems = int64_t{1} << 31;

template <class T>
constexpr int vector_length() {
  return sizeof(T) < 4 ? 8 : 4;
}

struct Item {
  int64_t sample, first;
  int size;
};

template <class T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vector {
  T values[kVec];
};

// Whether every item of the view can be moved as one vector. An absent tensor never stands in the
// way.
template <int kVec, class T>
bool vectorises(const View<T>& view, const Shape& shape) {
  if (!view.present()) return true;
  const bool aligned =
      reinterpret_cast<uintptr_t>(view.data) % alignof(Vector<std::remove_const_t<T>, kVec>) == 0;
  const bool rows_aligned = shape.samples == 1 || view.sample_stride % kVec == 0;
  return view.dense && aligned && rows_aligned && shape.elements() % kVec == 0;
}

template <bool kVectorised, int kVec, class C, class T>
__device__ __forceinline__ void load(const View<T>& view, const Item& item, int64_t pixels,
                                     C (&into)[kVec], int64_t skip = 0) {
  using Value = std::remove_const_t<T>;
  const int64_t first = item.first + skip;
  if constexpr (kVectorised) {
    const auto vector =
        *reinterpret_cast<const Vector<Value, kVec>*>(view.at(item.sample, first, pixels));
#pragma unroll
    for (int i = 0; i < kVec; ++i) into[i] = static_cast<C>(vector.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      into[i] = i < item.size ? static_cast<C>(*view.at(item.sample, first + i, pixels)) : C(0);
    }
  }
}

template <bool kVectorised, int kVec, class C, class T>
__device__ __forceinline__ void store(const View<T>& view, const Item& item, int64_t pixels,
                                      const C (&from)[kVec]) {
  if constexpr (kVectorised) {
    Vector<T, kVec> vector;
#pragma unroll
    for (int i = 0; i < kVec; ++i) vector.values[i] = static_cast<T>(from[i]);
    *reinterpret_cast<Vector<T, kVec>*>(view.at(item.sample, item.first, pixels)) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i < item.size) *view.at(item.sample, item.first + i, pixels) = static_cast<T>(from[i]);
    }
  }
}

template <int kVec, class C>
__device__ __forceinline__ void draw_normals(const NoiseKey& key, const Item& item,
                                             C (&into)[kVec]) {
  static_assert(kVec % kNormalsPerCall == 0, "an item starts with a new call");
#pragma unroll
  for (int i = 0; i < kVec; i += kNormalsPerCall) {
    const Normals z = normals(key, static_cast<uint32_t>((item.first + i) / kNormalsPerCall));
    into[i] = z.x;
    into[i + 1] = z.y;
    into[i + 2] = z.z;
    into[i + 3] = z.w;
  }
}

using Divider = at::cuda::detail::IntDivider<unsigned int>;

template <class Body, bool kVectorised, int kVec, class Kernel>
__global__ void __launch_bounds__(kThreads)
    item_kernel(const Kernel kernel, int64_t first_sample, unsigned int items, Divider per_sample) {
  const unsigned int stride = gridDim.x * kThreads;
  for (unsigned int i = blockIdx.x * kThreads + threadIdx.x; i < items; i += stride) {
    const auto place = per_sample.divmod(i);
    const int64_t first = static_cast<int64_t>(place.mod) * kVec;
    const int64_t left = kernel.shape.elements() - first;
    Body::template run<kVectorised, kVec>(
        kernel, Item{first_sample + place.div, first, static_cast<int>(left < kVec ? left : kVec)});
  }
}

// How many blocks the current device can hold at a time.
inline int64_t resident_blocks() {
  int device = 0, processors = 0, threads = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  return int64_t{processors} * (threads / kThreads);
}

// Runs Body::run<kVectorised, kVec>(kernel, item) over all items of the batch, on the current
// stream; a batch of more than kMaxItems takes several launches.
template <class Body, int kVec, class Kernel>
void for_each_item(const Kernel& kernel, bool vectorised) {
  const int64_t per_sample = (kernel.shape.elements() + kVec - 1) / kVec;
  TORCH_CHECK_VALUE(per_sample < kMaxItems, "a sample must have fewer than ", kMaxItems * kVec,
                    " elements; got ", kernel.shape.elements());
  const int64_t samples_at_once = kMaxItems / per_sample;
  const int64_t most_blocks = 4 * resident_blocks();
  const auto run =
      vectorised ? item_kernel<Body, true, kVec, Kernel> : item_kernel<Body, false, kVec, Kernel>;
  for (int64_t first = 0; first < kernel.shape.samples; first += samples_at_once) {
    const int64_t samples = std::min(samples_at_once, kernel.shape.samples - first);
    const int64_t items = samples * per_sample;
    const int64_t blocks = std::min((items + kThreads - 1) / kThreads, most_blocks);
    run<<<static_cast<unsigned int>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        kernel, first, static_cast<unsigned int>(items),
        Divider(static_cast<unsigned int>(per_sample)));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace ddpm_fast::cuda
