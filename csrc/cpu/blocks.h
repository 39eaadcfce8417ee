// A batch is worked through in blocks of a sample's elements, in logical order and small enough
// for the first-level cache. A block of any type and layout is staged as contiguous numbers of the
// compute type; where it lies so already, it is used in place.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "normals.h"
#include "simd.h"

namespace ddpm_fast::cpu {

constexpr int kBlock = 1024;
static_assert(kBlock == kNormalsPerCall * kMostCalls, "a block's normals are drawn at once");

// Its normals are drawn in so many parts.
constexpr int kParts = 4;

// Fewer elements than this are not worth another thread.
constexpr int64_t kGrain = 16384;

struct Block {
  int64_t sample, first;
  int size;
};

// Runs Body::run(kernel, block) over all blocks of the batch.
template <class Body, class Kernel>
void for_each_block(const Kernel& kernel) {
  const int64_t elements = kernel.shape.elements();
  const int64_t per_sample = (elements + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min<int64_t>(elements, kBlock));
  const auto run = best_version<Body, const Kernel&, const Block&>();
  at::parallel_for(0, kernel.shape.samples * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_sample * kBlock;
      run(kernel, Block{i / per_sample, first,
                        static_cast<int>(std::min<int64_t>(kBlock, elements - first))});
    }
  });
}

// Calls f(address, stride, offset in the block, count) for each evenly spaced run of the block,
// whose first element is logical element `first` of its sample.
template <class T, class F>
DDPM_INLINE void for_each_run(const View<T>& view, const Block& block, int64_t first,
                              int64_t pixels, const F& f) {
  if (view.dense) return f(view.at(block.sample, first, pixels), int64_t{1}, 0, block.size);
  for (int done = 0; done < block.size;) {
    const int64_t e = first + done;
    const int count = static_cast<int>(std::min<int64_t>(block.size - done, pixels - e % pixels));
    f(view.at(block.sample, e, pixels), view.pixel_stride, done, count);
    done += count;
  }
}

// The block's numbers as T: in the tensor itself, or else copied into the buffer. `skip` elements
// of the sample lie before the part that the block counts in.
template <class T, class Source>
DDPM_INLINE const T* load(const View<Source>& view, const Block& block, int64_t pixels, T* buffer,
                          int64_t skip = 0) {
  const int64_t first = block.first + skip;
  if constexpr (std::is_same_v<std::remove_const_t<Source>, T>) {
    if (view.dense) return view.at(block.sample, first, pixels);
  }
  for_each_run(view, block, first, pixels,
               [&](const Source* from, int64_t stride, int offset, int count) DDPM_LAMBDA_INLINE {
                 if (stride == 1) {
                   for (int i = 0; i < count; ++i) buffer[offset + i] = static_cast<T>(from[i]);
                 } else {
                   for (int i = 0; i < count; ++i) {
                     buffer[offset + i] = static_cast<T>(from[i * stride]);
                   }
                 }
               });
  return buffer;
}

// Where to put the block's results before store(): the tensor itself where it can take them.
template <class T, class Target>
DDPM_INLINE T* target(const View<Target>& view, const Block& block, int64_t pixels, T* buffer) {
  if constexpr (std::is_same_v<Target, T>) {
    if (view.dense) return view.at(block.sample, block.first, pixels);
  }
  return buffer;
}

template <class T, class Target>
DDPM_INLINE void store(const View<Target>& view, const Block& block, int64_t pixels,
                       const T* values) {
  if constexpr (std::is_same_v<Target, T>) {
    if (values == view.at(block.sample, block.first, pixels)) return;
  }
  for_each_run(view, block, block.first, pixels,
               [&](Target* to, int64_t stride, int offset, int count) DDPM_LAMBDA_INLINE {
                 if (stride == 1) {
                   for (int i = 0; i < count; ++i) to[i] = static_cast<Target>(values[offset + i]);
                 } else {
                   for (int i = 0; i < count; ++i) {
                     to[i * stride] = static_cast<Target>(values[offset + i]);
                   }
                 }
               });
}

// Asks for one of the parts of the block that lies behind this one in memory.
template <class T>
DDPM_INLINE void prefetch_next(const View<T>& view, const Block& block, int64_t pixels, int part) {
  if (!view.present() || !view.dense) return;
  constexpr int kCacheLine = 64, kBytes = kBlock / kParts * static_cast<int>(sizeof(T));
  const T* next = view.at(block.sample, block.first, pixels) + block.size;
  const char* address = reinterpret_cast<const char*>(next) + part * kBytes;
  for (int byte = 0; byte < kBytes; byte += kCacheLine) DDPM_PREFETCH(address + byte);
}

// The block's normals; the buffer has room for the whole of the last call. As the memory idles
// meanwhile, it is asked for what the views hold of the next block, a part at a time.
template <class... Views>
DDPM_INLINE void draw_normals(const NoiseKey& key, const Block& block, const Shape& shape,
                              float* buffer, const Views&... views) {
  constexpr int kCalls = kMostCalls / kParts;
  const bool last =
      block.sample + 1 == shape.samples && block.first + block.size == shape.elements();
  const uint32_t first_call = static_cast<uint32_t>(block.first / kNormalsPerCall);
  const int calls = (block.size + kNormalsPerCall - 1) / kNormalsPerCall;
  for (int part = 0, done = 0; done < calls; ++part, done += kCalls) {
    if (!last) (prefetch_next(views, block, shape.pixels, part), ...);
    draw_normals(key, first_call + done, std::min(kCalls, calls - done),
                 buffer + done * kNormalsPerCall);
  }
}

template <class... Views>
DDPM_INLINE void draw_normals(const NoiseKey& key, const Block& block, const Shape& shape,
                              double* buffer, const Views&... views) {
  float normals[kBlock];
  draw_normals(key, block, shape, normals, views...);
  for (int i = 0; i < block.size; ++i) buffer[i] = normals[i];
}

}  // namespace ddpm_fast::cpu
