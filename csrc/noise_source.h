// Where a kernel finds the key of a sample's noise: numbers in its own device's memory, so that a
// captured graph can be replayed with another seed, step or range of samples.
#pragma once

#include "philox.h"

namespace ddpm_fast {

// What a run of numbers is for; ddpm_fast.reference.STREAMS names the same. Which of them a reverse
// step draws from, its row tells: a step that is taken again draws from kResampled and up.
enum Stream : int64_t { kInitial = 0, kReverse = 1, kForward = 2, kResampled = 3 };

// One number for the batch (stride 0), or one for each sample.
struct Index {
  const int64_t* data = nullptr;
  int64_t stride = 0;

  DDPM_HOST_DEVICE bool present() const { return data != nullptr; }
  DDPM_HOST_DEVICE int64_t operator[](int64_t sample) const { return data[sample * stride]; }
};

struct NoiseSource {
  Index seed, sample_index;

  DDPM_HOST_DEVICE bool present() const { return seed.present(); }
  DDPM_HOST_DEVICE NoiseKey key(int64_t sample, int64_t timestep, int64_t stream) const {
    return NoiseKey(seed[sample], sample_index[sample], timestep, stream);
  }
};

}  // namespace ddpm_fast
