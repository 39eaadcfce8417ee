#include "rerun.h"

#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>

namespace ddpm_fast {
namespace {

Prepare& prepare_for(c10::DeviceType device) {
  static std::array<Prepare, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table[static_cast<size_t>(device)];
}

// A call passes through these, for which the op has no rule.
constexpr c10::DispatchKeySet kPassedThrough =
    c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});

// Neither mode nor transform, gradient nor profiler stands between a call and its kernel.
bool comes_straight(c10::DispatchKeySet keys) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const auto left = (keys | local.included_) - local.excluded_ - kPassedThrough;
  return c10::toFunctionalityKey(left.highestPriorityTypeId()) == c10::DispatchKey::Dense &&
         !at::hasCallbacks();
}

}  // namespace

RerunRegistration::RerunRegistration(c10::DeviceType device, Prepare prepare) {
  prepare_for(device) = prepare;
}

bool Rerun::serves(const ReverseStep& a) const {
  const Tensor& output = a.model_output;
  const auto overwritten = [&](const Tensor* t) { return t != nullptr && overlap(*t, output); };
  return run_on && comes_straight(output.key_set() | a.x_t.key_set()) &&
         output.scalar_type() == dtype && output.device() == device && output.sizes() == sizes &&
         output.strides() == strides && !overwritten(&a.out) &&
         !overwritten(address_of(a.pred_xstart)) && !overwritten(address_of(a.next_input)) &&
         choose_rows();
}

// As check_range, of numbers at hand.
bool Rerun::choose_rows() const {
  for (int64_t i = 0; i < steps_to_check; ++i) {
    if (step[i] < 0 || step[i] >= num_rows) return false;
  }
  return true;
}

void Rerun::operator()(const ReverseStep& a) const {
  run_on(a.model_output.const_data_ptr());
  mark_written(a);
}

void Rerun::remember(const ReverseStep& a) {
  const Tensor& output = a.model_output;
  const Prepare prepare = prepare_for(output.device().type());
  run_on = prepare == nullptr || output.numel() == 0 ? RunOn() : prepare(a);
  dtype = output.scalar_type();
  device = output.device();
  sizes = output.sizes();
  strides = output.strides();
  step = index_of(a.step);
  steps_to_check = a.step.is_cpu() ? a.step.numel() : 0;
  num_rows = a.rows.size(0);
}

}  // namespace ddpm_fast
