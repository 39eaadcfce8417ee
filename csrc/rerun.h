// A step in place, run again on the next output of the same network: what was checked once and
// cannot have changed is not looked at again. Behind a small network, which has driven code as well
// as data out of the caches, that would take longer than the kernel.
#pragma once

#include <vector>

#include "reverse_step_op.h"

namespace ddpm_fast {

// A backend's way from the arguments of a step to its kernel, registered for its device.
using Prepare = RunOn (*)(const ReverseStep&);
struct RerunRegistration {
  RerunRegistration(c10::DeviceType device, Prepare prepare);
};

class Rerun {
 public:
  // Whether the output is like the last one, in memory of its own, and the dispatcher would lead
  // straight to the kernel.
  bool serves(const ReverseStep& a) const;
  void operator()(const ReverseStep& a) const;
  // Called behind a step that went through the dispatcher and all checks.
  void remember(const ReverseStep& a);

 private:
  RunOn run_on;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  std::vector<int64_t> sizes, strides;
};

}  // namespace ddpm_fast
