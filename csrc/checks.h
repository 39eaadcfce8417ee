// Argument checks. Each sentence stands a second time in ddpm_fast/checks.py, for the backend that
// has no extension, and tests/test_errors.py holds the two together.
#pragma once

#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "layout.h"
#include "noise_source.h"
#include "text.h"

namespace ddpm_fast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const Argument& a) {
  return out << a.op << ": " << a.name;
}

inline std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

inline at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_state_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

inline void check_floating(const Argument& a) {
  TORCH_CHECK_TYPE(is_state_dtype(a.tensor.scalar_type()), a,
                   " must be float32, float64, bfloat16 or float16; got ",
                   dtype_name(a.tensor.scalar_type()));
}

inline void check_dtype(const Argument& a, at::ScalarType wanted) {
  TORCH_CHECK_TYPE(a.tensor.scalar_type() == wanted, a, " must be ", dtype_name(wanted), "; got ",
                   dtype_name(a.tensor.scalar_type()));
}

inline void check_both_double(const Argument& a, const Argument& like) {
  const bool is_double = a.tensor.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(is_double == (like.tensor.scalar_type() == at::kDouble), a, " and ", like.name,
                   " must both be float64, or neither; got ", dtype_name(a.tensor.scalar_type()),
                   " and ", dtype_name(like.tensor.scalar_type()));
}

inline void check_device(const Argument& a, const Argument& like) {
  TORCH_CHECK_VALUE(a.tensor.device() == like.tensor.device(), a, " must be on the device of ",
                    like.name, "; got ", a.tensor.device(), " and ", like.tensor.device());
}

inline void check_batch(const Argument& a) {
  TORCH_CHECK_VALUE(a.tensor.dim() >= 2, a, " must have at least two dimensions, [N, C, ...]; got ",
                    text(a.tensor.sizes()));
}

inline void check_same_shape(const Argument& a, const Argument& like) {
  TORCH_CHECK_VALUE(a.tensor.sizes() == like.tensor.sizes(), a, " must have the shape of ",
                    like.name, "; got ", text(a.tensor.sizes()), " and ",
                    text(like.tensor.sizes()));
}

inline bool has_shape(const Tensor& t, const Tensor& like, int64_t times_samples,
                      int64_t times_channels) {
  bool same = t.dim() == like.dim() && t.size(0) == times_samples * like.size(0) &&
              t.size(1) == times_channels * like.size(1);
  for (int64_t d = 2; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  return same;
}

// A network's output: for each sample, or with guidance twice for each; the second half of doubled
// channels is a variance.
inline void check_output_shape(const Argument& a, const Argument& like, bool guided) {
  const int64_t times = guided ? 2 : 1;
  TORCH_CHECK_VALUE(
      has_shape(a.tensor, like.tensor, times, 1) || has_shape(a.tensor, like.tensor, times, 2), a,
      " must have ", guided ? "twice the samples of x_t" : "the shape of x_t",
      ", or twice its channels; got ", text(a.tensor.sizes()), " and ", text(like.tensor.sizes()));
}

// The stride from one pixel to the next, or nothing where the pixels are not evenly spaced.
inline std::optional<int64_t> pixel_stride(const Tensor& t) {
  std::optional<int64_t> stride;
  int64_t span = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (!stride) stride = t.stride(d);
    if (t.stride(d) != *stride * span) return std::nullopt;
    span *= t.size(d);
  }
  return stride.value_or(1);
}

inline void check_layout(const Argument& a) {
  TORCH_CHECK_VALUE(a.tensor.numel() == 0 || pixel_stride(a.tensor).has_value(), a,
                    " must be contiguous or channels_last within each sample; got shape ",
                    text(a.tensor.sizes()), " with strides ", text(a.tensor.strides()));
}

// An int64 tensor with one entry for the batch, or one for each sample.
inline void check_index(const Argument& a, const Argument& like, bool scalar_allowed) {
  check_dtype(a, at::kLong);
  check_device(a, like);
  const bool per_sample = a.tensor.dim() == 1 && a.tensor.size(0) == like.tensor.size(0);
  const bool scalar = scalar_allowed && a.tensor.dim() == 0;
  TORCH_CHECK_VALUE(per_sample || scalar, a, " must have shape ", scalar_allowed ? "[] or " : "",
                    "[", text(like.tensor.size(0)), "]; got ", text(a.tensor.sizes()));
}

inline void check_rows(const Argument& a, const Argument& like, int64_t columns) {
  check_dtype(a, compute_dtype(like.tensor.scalar_type()));
  check_device(a, like);
  TORCH_CHECK_VALUE(a.tensor.dim() == 2 && a.tensor.size(1) == columns && a.tensor.is_contiguous(),
                    a, " must be contiguous with shape [number of rows, ", text(columns), "]; got ",
                    text(a.tensor.sizes()), " with strides ", text(a.tensor.strides()));
}

// One number for each row of the table and each sample, or one for all of either.
inline void check_scale(const Argument& a, const Argument& like, const Argument& rows) {
  check_dtype(a, compute_dtype(like.tensor.scalar_type()));
  check_device(a, like);
  const auto fits = [&](int64_t d, int64_t size) {
    return a.tensor.size(d) == 1 || a.tensor.size(d) == size;
  };
  TORCH_CHECK_VALUE(
      a.tensor.dim() == 2 && fits(0, rows.tensor.size(0)) && fits(1, like.tensor.size(0)), a,
      " must have shape [1 or ", text(rows.tensor.size(0)), ", 1 or ", text(like.tensor.size(0)),
      "]; got ", text(a.tensor.sizes()));
}

// One number for each sample.
inline void check_per_sample(const Argument& a, const Argument& like) {
  check_dtype(a, compute_dtype(like.tensor.scalar_type()));
  check_device(a, like);
  TORCH_CHECK_VALUE(a.tensor.dim() == 1 && a.tensor.size(0) == like.tensor.size(0), a,
                    " must have shape [", text(like.tensor.size(0)), "]; got ",
                    text(a.tensor.sizes()));
}

inline Index index_of(const Tensor& t) {
  return {t.const_data_ptr<int64_t>(), t.dim() == 0 ? 0 : t.stride(0)};
}

// Only indices that lie on the host can be read without making it wait for a device, whose kernel
// asserts the range instead.
inline void check_range(const Argument& index, const Argument& rows) {
  if (!index.tensor.is_cpu()) return;
  const Index values = index_of(index.tensor);
  for (int64_t i = 0; i < index.tensor.numel(); ++i) {
    TORCH_CHECK_INDEX(0 <= values[i] && values[i] < rows.tensor.size(0), index, " must lie in [0, ",
                      text(rows.tensor.size(0) - 1), "]; got ", text(values[i]));
  }
}

// The noise is drawn, given, or absent.
inline void check_noise_source(const Argument& like, const OptionalTensor& noise,
                               const OptionalTensor& seed, const OptionalTensor& sample_index) {
  TORCH_CHECK_VALUE(seed.has_value() == sample_index.has_value(), like.op,
                    ": seed and sample_index must be given together");
  TORCH_CHECK_VALUE(!(noise && seed), like.op, ": give noise or a seed, not both");
  if (seed) {
    check_index({like.op, "seed", *seed}, like, true);
    check_index({like.op, "sample_index", *sample_index}, like, false);
  }
}

// Like the batch in shape, dtype and device, and laid out so that a kernel can walk it.
inline void check_like(const Argument& a, const Argument& like) {
  check_dtype(a, like.tensor.scalar_type());
  check_device(a, like);
  check_same_shape(a, like);
  check_layout(a);
}

inline bool same_view(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
         a.sizes() == b.sizes() && a.strides() == b.strides();
}

// The addresses that a tensor spans, gaps included.
inline std::pair<const char*, const char*> span(const Tensor& t) {
  int64_t last = t.numel() - 1;
  if (!t.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  }
  const char* first = static_cast<const char*>(t.const_data_ptr());
  return {first, first + (last + 1) * t.element_size()};
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto s = span(a), t = span(b);
  return t.first < s.second && s.first < t.second;
}

inline void check_no_overlap(const Argument& written, const Argument& other,
                             bool same_view_allowed) {
  if (same_view_allowed && same_view(written.tensor, other.tensor)) return;
  TORCH_CHECK_VALUE(!overlap(written.tensor, other.tensor), written,
                    " must not overlap the memory of ", other.name);
}

// Whether each dimension steps over all that the dimensions of smaller strides span.
inline bool elements_are_apart(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span) return false;
    span += stride * (size - 1);
  }
  return true;
}

inline void check_apart(const Argument& a) {
  TORCH_CHECK_VALUE(a.tensor.numel() == 0 || elements_are_apart(a.tensor), a,
                    " must not share memory among its elements; got strides ",
                    text(a.tensor.strides()));
}

// A tensor to write into: each element at an address of its own.
inline void check_output(const Argument& a, const Argument& like) {
  check_like(a, like);
  check_apart(a);
}

// What the network reads next, in any type, and with guidance twice.
inline void check_next_input(const Argument& a, const Argument& like) {
  check_floating(a);
  check_both_double(a, like);
  check_device(a, like);
  TORCH_CHECK_VALUE(
      has_shape(a.tensor, like.tensor, 1, 1) || has_shape(a.tensor, like.tensor, 2, 1), a,
      " must have the shape of ", like.name, ", or twice its samples; got ", text(a.tensor.sizes()),
      " and ", text(like.tensor.sizes()));
  check_layout(a);
  check_apart(a);
}

inline void check_next_step(const Argument& a, const Argument& step, const Argument& like) {
  check_dtype(a, at::kLong);
  check_device(a, like);
  check_same_shape(a, step);
  check_apart(a);
}

inline void check_next_t(const Argument& a, const Argument& like) {
  check_dtype(a, at::kLong);
  check_device(a, like);
  const int64_t samples = like.tensor.size(0);
  const bool fits =
      a.tensor.dim() == 1 && (a.tensor.size(0) == samples || a.tensor.size(0) == 2 * samples);
  TORCH_CHECK_VALUE(fits, a, " must have shape [", text(samples), "] or [", text(2 * samples),
                    "]; got ", text(a.tensor.sizes()));
  check_apart(a);
}

// What is written into has no gradient to carry.
inline void check_carry_no_gradient(const char* op, std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (const Tensor* t : tensors) {
    TORCH_CHECK(t == nullptr || !t->requires_grad(), op,
                ": what is written into carries no gradient, but a tensor requires one");
  }
}

inline const Tensor* address_of(const OptionalTensor& t) { return t ? &*t : nullptr; }

// Lets autograd notice that a tensor which it has saved is no longer what it was.
inline void mark_written(const Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); }

inline Shape shape_of(const Tensor& x) {
  const int64_t samples = x.size(0), channels = x.size(1);
  return {samples, channels, x.numel() == 0 ? 0 : x.numel() / (samples * channels)};
}

template <class T>
View<T> view_of(const Tensor& t, const Shape& shape) {
  View<T> view;
  if constexpr (std::is_const_v<T>) {
    view.data = static_cast<T*>(t.const_data_ptr());
  } else {
    view.data = static_cast<T*>(t.mutable_data_ptr());
  }
  view.sample_stride = t.stride(0);
  view.channel_stride = t.stride(1);
  view.pixel_stride = pixel_stride(t).value_or(1);
  const bool pixels_dense = shape.pixels == 1 || view.pixel_stride == 1;
  view.dense = pixels_dense && (t.size(1) == 1 || view.channel_stride == shape.pixels);
  return view;
}

template <class T>
View<T> view_of(const OptionalTensor& t, const Shape& shape) {
  return t ? view_of<T>(*t, shape) : View<T>{};
}

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

inline AnyView any_view_of(const OptionalTensor& t, const Shape& shape) {
  if (!t) return {};
  const auto view = view_of<char>(*t, shape);
  return {view.data,         view.sample_stride, view.channel_stride,
          view.pixel_stride, view.dense,         dtype_of(*t)};
}

inline Index index_of(const OptionalTensor& t) { return t ? index_of(*t) : Index{}; }

}  // namespace ddpm_fast
