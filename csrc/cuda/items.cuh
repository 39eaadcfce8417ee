// A batch is cut into items, an item a thread: a few elements of one sample that are neighbours in
// logical order, as the noise is drawn for four such at a time, and in a large batch several times
// as many. Three kinds of item tell how the layout of the tensors lets a thread reach its elements.
#pragma once

#include <c10/macros/Macros.h>
#include <cuda_runtime_api.h>
#include <ATen/cuda/detail/IntegerDivider.cuh>

#include <algorithm>
#include <type_traits>

#include "../layout.h"
#include "../philox.h"

namespace ddpm_fast::cuda {

// Few, so that even a small batch is spread over many multiprocessors.
constexpr int kThreads = 128;

// Item numbers stay below 2^31, so that a cheap 32-bit division finds an item's sample.
constexpr int64_t kMaxItems = int64_t{1} << 31;

using Divider = at::cuda::detail::IntDivider<unsigned int>;

// What one access moves of a vector of kBytes.
template <int kBytes>
using Chunk = std::conditional_t<kBytes == sizeof(uint2), uint2, uint4>;

// nvcc may take an assignment apart into one for each number.
DDPM_HOST_DEVICE void store_chunk(uint2* to, const uint2& chunk) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(chunk.x), "r"(chunk.y) : "memory");
#else
  *to = chunk;
#endif
}

DDPM_HOST_DEVICE void store_chunk(uint4* to, const uint4& chunk) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(chunk.x), "r"(chunk.y),
               "r"(chunk.z), "r"(chunk.w)
               : "memory");
#else
  *to = chunk;
#endif
}

constexpr int kWarp = 32;

template <class From, class To, int kVec>
DDPM_HOST_DEVICE void convert(const From (&from)[kVec], To (&to)[kVec]) {
  if constexpr (std::is_same_v<From, c10::BFloat16> && std::is_same_v<To, float>) {
    // Upper halves of floats: two in a word, the first in its lower half, take two instructions
    // instead of three.
    static_assert(kVec % 2 == 0);
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      uint32_t pair;
      memcpy(&pair, from + i, sizeof pair);
      to[i] = float_from_bits(static_cast<int32_t>(pair << 16));
      to[i + 1] = float_from_bits(static_cast<int32_t>(pair & 0xffff0000u));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// kCount vectors of neighbours in memory too, moved in accesses of 16 bytes. Between the vectors of
// one thread lie those of its warp's other threads, so that the warp's accesses are contiguous.
template <int kLength, int kCount>
struct VectorItem {
  static constexpr int kVec = kLength * kCount;
  uint32_t sample;
  int64_t first;

  static int64_t per_sample(const Shape& shape) { return shape.elements() / kVec; }
  static int64_t divisor(const Shape&) { return 1; }

  DDPM_HOST_DEVICE VectorItem(uint32_t sample, uint32_t number, const Shape&, Divider)
      : sample(sample), first(int64_t{number / kWarp} * kWarp * kVec + number % kWarp * kLength) {}

  // Of element i from the first.
  static DDPM_HOST_DEVICE constexpr int distance(int i) {
    return i / kLength * (kWarp * kLength) + i % kLength;
  }

  DDPM_HOST_DEVICE VectorItem in_variance(const Shape& shape) const {
    VectorItem item = *this;
    item.first += shape.elements();
    return item;
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void load(const View<T>& view, C (&into)[kVec]) const {
    using Value = std::remove_const_t<T>;
    using Access = Chunk<sizeof(Value) * kLength>;
    Value values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i += sizeof(Access) / sizeof(Value)) {
      const Access chunk = *reinterpret_cast<const Access*>(at(view) + distance(i));
      memcpy(static_cast<void*>(values + i), &chunk, sizeof chunk);
    }
    convert(values, into);
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void store(const View<T>& view, const C (&from)[kVec]) const {
    using Access = Chunk<sizeof(T) * kLength>;
    T values[kVec];
    convert(from, values);
#pragma unroll
    for (int i = 0; i < kVec; i += sizeof(Access) / sizeof(T)) {
      Access chunk;
      memcpy(&chunk, values + i, sizeof chunk);
      store_chunk(reinterpret_cast<Access*>(at(view) + distance(i)), chunk);
    }
  }

 private:
  template <class T>
  DDPM_HOST_DEVICE T* at(const View<T>& view) const {
    return view.data + sample * view.sample_stride + first;
  }
};

// Pixels of one channel. Items are numbered through the channels first, so that in channels_last
// the threads of a warp touch neighbouring memory, though none of them does by itself.
struct PixelItem {
  static constexpr int kVec = kNormalsPerCall;
  uint32_t sample;
  int64_t channel, pixel, first;

  static int64_t per_sample(const Shape& shape) { return shape.elements() / kVec; }
  static int64_t divisor(const Shape& shape) { return shape.channels; }

  DDPM_HOST_DEVICE PixelItem(uint32_t sample, uint32_t number, const Shape& shape,
                             Divider by_channels)
      : sample(sample) {
    const auto place = by_channels.divmod(number);
    channel = place.mod;
    pixel = int64_t{place.div} * kVec;
    first = channel * shape.pixels + pixel;
  }

  static DDPM_HOST_DEVICE constexpr int distance(int i) { return i; }

  DDPM_HOST_DEVICE PixelItem in_variance(const Shape& shape) const {
    PixelItem item = *this;
    item.channel += shape.channels;
    return item;
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void load(const View<T>& view, C (&into)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) into[i] = static_cast<C>(at(view)[i * view.pixel_stride]);
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void store(const View<T>& view, const C (&from)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) at(view)[i * view.pixel_stride] = static_cast<T>(from[i]);
  }

 private:
  template <class T>
  DDPM_HOST_DEVICE T* at(const View<T>& view) const {
    return view.data + sample * view.sample_stride + channel * view.channel_stride +
           pixel * view.pixel_stride;
  }
};

// Elements of any sample in any layout, reached one by one; the last item may have fewer.
struct ElementItem {
  static constexpr int kVec = kNormalsPerCall;
  uint32_t sample;
  int size;
  int64_t first, pixels;

  static int64_t per_sample(const Shape& shape) { return (shape.elements() + kVec - 1) / kVec; }
  static int64_t divisor(const Shape&) { return 1; }

  DDPM_HOST_DEVICE ElementItem(uint32_t sample, uint32_t number, const Shape& shape, const Divider&)
      : sample(sample), first(int64_t{number} * kVec), pixels(shape.pixels) {
    const int64_t left = shape.elements() - first;
    size = left < kVec ? static_cast<int>(left) : kVec;
  }

  static DDPM_HOST_DEVICE constexpr int distance(int i) { return i; }

  DDPM_HOST_DEVICE ElementItem in_variance(const Shape& shape) const {
    ElementItem item = *this;
    item.first += shape.elements();
    return item;
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void load(const View<T>& view, C (&into)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      into[i] = i < size ? static_cast<C>(*view.at(sample, first + i, pixels)) : C(0);
    }
  }

  template <class T, class C>
  DDPM_HOST_DEVICE void store(const View<T>& view, const C (&from)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i < size) *view.at(sample, first + i, pixels) = static_cast<T>(from[i]);
    }
  }
};

// Whether every item can be moved as one vector; an absent tensor never stands in the way.
template <int kVec, class T>
bool vectorises(const View<T>& view, const Shape& shape) {
  if (!view.present()) return true;
  const bool aligned =
      reinterpret_cast<uintptr_t>(view.data) % sizeof(Chunk<sizeof(T) * kVec>) == 0;
  return view.dense && aligned && view.sample_stride % kVec == 0 && shape.elements() % kVec == 0;
}

template <int kVec>
bool vectorises(const AnyView& view, const Shape& shape) {
  switch (view.dtype) {
    case Dtype::kFloat64:
      return vectorises<kVec>(view.as<double>(), shape);
    case Dtype::kFloat32:
      return vectorises<kVec>(view.as<float>(), shape);
    default:
      return vectorises<kVec>(view.as<c10::Half>(), shape);
  }
}

template <class Item, class T, int kVec>
DDPM_HOST_DEVICE void draw_normals(const NoiseKey& key, const Item& item, T (&into)[kVec]) {
  const auto first_call =
      static_cast<uint32_t>(static_cast<uint64_t>(item.first) / kNormalsPerCall);
#pragma unroll
  for (int i = 0; i < kVec; i += kNormalsPerCall) {
    const Normals z = normals(key, first_call + Item::distance(i) / kNormalsPerCall);
    into[i] = z.x;
    into[i + 1] = z.y;
    into[i + 2] = z.z;
    into[i + 3] = z.w;
  }
}

// A body says how many vectors of a State a thread takes in a large batch, and how many blocks with
// such an Item a multiprocessor is to hold at once, which limits the registers of their threads.
// (Here, as nvcc takes no member template where launch bounds stand.)
template <class Body, class Item>
constexpr int kBlocks = Body::template kBlocks<Item>;

template <class Body, class Item, class Kernel>
__global__ void __launch_bounds__(kThreads, kBlocks<Body, Item>)
    item_kernel(const Kernel kernel, uint32_t first_sample, uint32_t items, Divider per_sample,
                Divider divider) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= items) return;
  const auto place = per_sample.divmod(i);
  Body::run(kernel, Item(first_sample + place.div, place.mod, kernel.shape, divider));
}

// Runs Body::run(kernel, item) over all items; a batch of more than kMaxItems takes several
// launches.
template <class Body, class Item, class Kernel>
void run_items(const Kernel& kernel, cudaStream_t stream) {
  const Shape& shape = kernel.shape;
  const int64_t per_sample = Item::per_sample(shape);
  const int64_t samples_at_once = kMaxItems / per_sample;
  for (int64_t first = 0; first < shape.samples; first += samples_at_once) {
    const int64_t items = std::min(samples_at_once, shape.samples - first) * per_sample;
    const int64_t blocks = (items + kThreads - 1) / kThreads;
    item_kernel<Body, Item><<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(
        kernel, static_cast<uint32_t>(first), static_cast<uint32_t>(items),
        Divider(static_cast<unsigned int>(per_sample)),
        Divider(static_cast<unsigned int>(Item::divisor(shape))));
  }
}

// 16 bytes of a state's elements, or 32 of float64's, as normals come by fours.
template <class State>
constexpr int kVectorLength = sizeof(State) < 4 ? 8 : 4;

// A batch of fewer elements is better spread over more threads than handled by busier ones.
constexpr int64_t kManyElements = int64_t{1} << 20;

// run_items(), with the items that suit the layouts of all the views that the body reads or writes.
template <class Body, class State, class Kernel, class... Views>
void for_each_item(const Kernel& kernel, cudaStream_t stream, const Views&... views) {
  constexpr int kLength = kVectorLength<State>;
  constexpr int kCount = Body::template kVectors<State>;
  const Shape& shape = kernel.shape;
  const int64_t elements = shape.samples * shape.elements();
  if (!(vectorises<kLength>(views, shape) && ...)) {
    if (shape.pixels % PixelItem::kVec == 0 && (!views.dense || ...)) {
      run_items<Body, PixelItem>(kernel, stream);
    } else {
      run_items<Body, ElementItem>(kernel, stream);
    }
  } else if (elements < kManyElements || shape.elements() % (kWarp * kLength * kCount) != 0) {
    run_items<Body, VectorItem<kLength, 1>>(kernel, stream);
  } else {
    run_items<Body, VectorItem<kLength, kCount>>(kernel, stream);
  }
}

}  // namespace ddpm_fast::cuda
