// Where the elements of a batch lie: [N, C, *pixels], each sample contiguous or channels_last, or a
// slice of such along the batch or the channels.
#pragma once

#include "dtypes.h"
#include "portable.h"

namespace ddpm_fast {

struct Shape {
  int64_t samples, channels, pixels;

  DDPM_HOST_DEVICE int64_t elements() const { return channels * pixels; }
};

// A tensor's data seen as [sample][channel][pixel]; a null pointer stands for an absent tensor.
template <class T>
struct View {
  T* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0, pixel_stride = 0;
  bool dense = true;  // within a sample, logical order is memory order

  DDPM_HOST_DEVICE bool present() const { return data != nullptr; }

  // The address of logical element e of a sample.
  DDPM_HOST_DEVICE T* at(int64_t sample, int64_t e, int64_t pixels) const {
    T* const base = data + sample * sample_stride;
    if (dense) return base + e;
    return base + (e / pixels) * channel_stride + (e % pixels) * pixel_stride;
  }
};

// A view whose type is known only when the kernel runs.
struct AnyView {
  void* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0, pixel_stride = 0;
  bool dense = true;
  Dtype dtype = Dtype::kFloat32;

  DDPM_HOST_DEVICE bool present() const { return data != nullptr; }

  template <class T>
  DDPM_HOST_DEVICE View<T> as() const {
    return {static_cast<T*>(data), sample_stride, channel_stride, pixel_stride, dense};
  }

  // Calls f with a view of the type that is stored. Numbers computed as T are double if stored as
  // double, and only then.
  template <class T, class F>
  DDPM_HOST_DEVICE void visit(const F& f) const {
    if constexpr (std::is_same_v<T, double>) {
      f(as<double>());
    } else {
      switch (dtype) {
        case Dtype::kBFloat16:
          return f(as<c10::BFloat16>());
        case Dtype::kFloat16:
          return f(as<c10::Half>());
        default:
          return f(as<float>());
      }
    }
  }
};

}  // namespace ddpm_fast
