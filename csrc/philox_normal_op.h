// philox_normal: the normals of the noise contract by themselves, and philox, the words under them.
#pragma once

#include "checks.h"
#include "dispatch.h"
#include "philox_normal.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

namespace ddpm_fast {

// The ops around a backend's run(const PhiloxNormalKernel<State>&) and run(const PhiloxKernel&).
template <class Backend>
struct PhiloxForms {
  static Tensor normal(at::IntArrayRef size, const Tensor& seed, const Tensor& sample_index,
                       const Tensor& timestep, int64_t stream, at::ScalarType dtype) {
    const char* op = "philox_normal";
    TORCH_CHECK_VALUE(size.size() >= 1, op, ": shape must have at least one dimension; got ",
                      text(size));
    const Tensor out = at::empty(size, seed.options().dtype(dtype));
    const Argument like{op, "the result", out};
    check_floating(like);
    TORCH_CHECK_VALUE(0 <= stream && stream < 1 << 16, op, ": stream must lie in [0, 65535]; got ",
                      text(stream));
    check_noise_source(like, {}, seed, sample_index);
    check_index({op, "timestep", timestep}, like, true);
    if (out.numel() == 0) return out;

    const c10::DeviceGuard guard(out.device());
    const int64_t samples = size[0], elements = out.numel() / samples;
    dispatch(dtype, [&](auto state) {
      using State = typename decltype(state)::type;
      const View<State> view{out.mutable_data_ptr<State>(), elements, elements, 1, true};
      Backend::run(PhiloxNormalKernel<State>{{samples, 1, elements},
                                             view,
                                             index_of(timestep),
                                             stream,
                                             {index_of(seed), index_of(sample_index)}});
    });
    return out;
  }

  static Tensor words(const Tensor& counter, const Tensor& key) {
    const char* op = "philox";
    const Argument counter_argument{op, "counter", counter};
    check_dtype(counter_argument, at::kLong);
    check_dtype({op, "key", key}, at::kLong);
    check_device({op, "key", key}, counter_argument);
    TORCH_CHECK_VALUE(counter.dim() == 2 && counter.size(1) == 4, op,
                      ": counter must have shape [K, 4]; got ", text(counter.sizes()));
    TORCH_CHECK_VALUE(key.dim() == 2 && key.size(0) == counter.size(0) && key.size(1) == 2, op,
                      ": key must have shape [", text(counter.size(0)), ", 2]; got ",
                      text(key.sizes()));
    const Tensor counters = counter.contiguous(), keys = key.contiguous();
    const Tensor out = at::empty_like(counters);
    if (out.numel() == 0) return out;
    const c10::DeviceGuard guard(out.device());
    Backend::run(PhiloxKernel{counter.size(0), counters.const_data_ptr<int64_t>(),
                              keys.const_data_ptr<int64_t>(), out.mutable_data_ptr<int64_t>()});
    return out;
  }
};

}  // namespace ddpm_fast
