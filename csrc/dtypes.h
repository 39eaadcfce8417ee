// The types that the numbers of a batch may have.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace ddpm_fast {

enum class Dtype : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Arithmetic is done in double for double, and in float for all else.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace ddpm_fast
