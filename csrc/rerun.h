// A step in place, run again on the next output of the same network: what was checked once and
// cannot have changed is not looked at again. Behind a small network, which has driven code as well
// as data out of the caches, that would take longer than the kernel.
#pragma once

#include <ATen/core/DimVector.h>

#include "reverse_step_op.h"

namespace ddpm_fast {

// A backend's way from the arguments of a step to its kernel, registered for its device.
using Prepare = RunOn (*)(const ReverseStep&);
struct RerunRegistration {
  RerunRegistration(c10::DeviceType device, Prepare prepare);
};

class Rerun {
 public:
  // Whether the output is like the last one, in memory of its own, the steps choose rows that there
  // are, and the dispatcher would lead straight to the kernel.
  bool serves(const ReverseStep& a) const;
  void operator()(const ReverseStep& a) const;
  // Called behind a step that went through the dispatcher and all checks.
  void remember(const ReverseStep& a);

 private:
  RunOn run_on;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  at::DimVector sizes, strides;
  Index step;
  int64_t steps_to_check = 0, num_rows = 0;  // none where they lie on a device

  bool choose_rows() const;
};

}  // namespace ddpm_fast
