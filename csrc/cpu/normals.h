// The normals of the noise contract on the CPU, many calls of Philox at a time.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace ddpm_fast::cpu {

// As many calls as draw_normals() may be asked for at once.
constexpr int kMostCalls = 256;

// Writes the normals of the calls first_call, first_call + 1, ... in order, four of each call.
void draw_normals(const NoiseKey& key, uint32_t first_call, int calls, float* normals);

}  // namespace ddpm_fast::cpu
