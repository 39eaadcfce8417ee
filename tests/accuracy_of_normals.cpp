// Compares the two factors of a normal with double precision, over every word that differs.
// Prints the largest relative error of each in units of 2^-24.
#include <algorithm>
#include <cstdio>

#include "philox.h"

int main() {
  double radius_error = 0, direction_error = 0;
  float previous = -1;
  for (int64_t half = 0; half < int64_t{1} << 31; ++half) {
    const float rounded = static_cast<float>(half);
    if (rounded == previous) continue;
    previous = rounded;
    const double u = static_cast<float>(rounded * 0x1p-31f + 0x1p-32f);
    const double truth = std::sqrt(-2 * std::log(u));
    const double radius = 2 * ddpm_fast::box_muller_half_radius(static_cast<uint32_t>(half) << 1);
    if (truth == 0 && radius != 0) return 1;
    if (truth > 0) radius_error = std::max(radius_error, std::fabs(radius - truth) / truth);
  }
  const double two_pi = 6.283185307179586;
  for (int64_t angle = 0; angle < int64_t{1} << 26; ++angle) {
    float cosine, sine;
    ddpm_fast::box_muller_pair(0.5f, static_cast<uint32_t>(angle) << 6, cosine, sine);
    // Within an eighth of a turn of the nearest axis, where double's own error is small.
    const int64_t quadrant = (angle + (1 << 23)) >> 24;
    const double rest = two_pi * static_cast<double>(angle - (quadrant << 24)) * 0x1p-26;
    double c = std::cos(rest), s = std::sin(rest);
    for (int turn = 0; turn < quadrant % 4; ++turn) {
      const double before = c;
      c = -s;
      s = before;
    }
    for (const auto [ours, truth] : {std::pair<double, double>{cosine, c}, {sine, s}}) {
      if (truth == 0 && ours != 0) return 1;
      if (truth != 0) {
        direction_error = std::max(direction_error, std::fabs(ours - truth) / std::fabs(truth));
      }
    }
  }
  std::printf("%.4f %.4f\n", radius_error * 0x1p24, direction_error * 0x1p24);
  return 0;
}
