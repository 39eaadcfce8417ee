// From the dtypes of tensors to the types of a kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtypes.h"

namespace ddpm_fast {

template <class T>
struct Type {
  using type = T;
};

// Calls f with the type of a float32, bfloat16 or float16 tensor.
template <class F>
void dispatch_narrow(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kBFloat16:
      return f(Type<c10::BFloat16>{});
    case at::kHalf:
      return f(Type<c10::Half>{});
    default:
      return f(Type<float>{});
  }
}

// The same with float64; what else there is, the checks have refused.
template <class F>
void dispatch(at::ScalarType dtype, F&& f) {
  if (dtype == at::kDouble) return f(Type<double>{});
  dispatch_narrow(dtype, f);
}

}  // namespace ddpm_fast
