// philox_normal and philox on the CPU.
#include "../philox_normal_op.h"
#include "blocks.h"

namespace ddpm_fast::cpu {
namespace {

struct PhiloxNormalBlock {
  template <class K>
  static DDPM_INLINE void run(const K& k, const Block& block) {
    float buffer[kBlock];
    draw_normals(k.source.key(block.sample, k.timestep[block.sample], k.stream), block, k.shape,
                 buffer, k.out);
    store(k.out, block, k.shape.pixels, buffer);
  }
};

struct Backend {
  template <class State>
  static void run(const PhiloxNormalKernel<State>& kernel) {
    for_each_block<PhiloxNormalBlock>(kernel);
  }
  static void run(const PhiloxKernel& kernel) {
    at::parallel_for(0, kernel.calls, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t call = begin; call < end; ++call) kernel.run(call);
    });
  }
};

using Forms = PhiloxForms<Backend>;

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("philox_normal", &Forms::normal);
  m.impl("philox", &Forms::words);
}

}  // namespace ddpm_fast::cpu
