// What the kernels of philox_normal and philox need to know, as plain data.
#pragma once

#include "layout.h"
#include "noise_source.h"

namespace ddpm_fast {

template <class State_>
struct PhiloxNormalKernel {
  using State = State_;

  Shape shape;
  View<State> out;
  Index timestep;
  int64_t stream;
  NoiseSource source;
};

struct PhiloxKernel {
  int64_t calls;
  const int64_t *counter, *key;
  int64_t* out;

  // Words travel in int64 tensors, for want of arithmetic on uint32 ones.
  DDPM_HOST_DEVICE void run(int64_t call) const {
    const int64_t* c = counter + 4 * call;
    const Words words = philox4x32_10({static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                                       static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3])},
                                      static_cast<uint32_t>(key[2 * call]),
                                      static_cast<uint32_t>(key[2 * call + 1]));
    int64_t* w = out + 4 * call;
    w[0] = words.x;
    w[1] = words.y;
    w[2] = words.z;
    w[3] = words.w;
  }
};

}  // namespace ddpm_fast
