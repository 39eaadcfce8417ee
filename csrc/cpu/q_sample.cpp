// q_sample on the CPU.
#include "../q_sample_op.h"
#include "blocks.h"

namespace ddpm_fast::cpu {
namespace {

struct QSampleBlock {
  template <class K>
  static DDPM_INLINE void run(const K& k, const Block& block) {
    using State = typename K::State;
    using T = typename K::T;
    const int64_t pixels = k.shape.pixels;
    const T signal = k.signal(block.sample), scale = k.scale(block.sample);
    T x_buffer[kBlock], noise_buffer[kBlock], result_buffer[kBlock];

    const T* x_start = load(k.x_start, block, pixels, x_buffer);
    const T* noise = noise_buffer;
    if (k.source.present()) {
      draw_normals(k.source.key(block.sample, k.t[block.sample], kForward), block, k.shape,
                   noise_buffer, k.x_start, k.drawn_noise, k.x_t);
      // x_t must hold the noise that is returned, so what rounds the one rounds the other.
      for (int i = 0; i < block.size; ++i) {
        noise_buffer[i] = static_cast<T>(static_cast<State>(noise_buffer[i]));
      }
      store(k.drawn_noise, block, pixels, noise_buffer);
    } else {
      noise = load(k.given_noise, block, pixels, noise_buffer);
    }
    T* x_t = target(k.x_t, block, pixels, result_buffer);
    for (int i = 0; i < block.size; ++i) x_t[i] = signal * x_start[i] + scale * noise[i];
    store(k.x_t, block, pixels, x_t);
  }
};

struct Backend {
  template <class K>
  static void run(const K& kernel) {
    for_each_block<QSampleBlock>(kernel);
  }
};

using Forms = QSampleForms<Backend>;

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("q_sample", &Forms::given);
  m.impl("q_sample.drawn", &Forms::drawn);
  m.impl("q_sample.out", &Forms::out);
}

}  // namespace ddpm_fast::cpu
