// The noise: Philox4x32-10 words and the normals made of them, the same on every backend.
//
// Philox4x32-10 is the counter-based generator of Salmon, Moraes, Dror & Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011), with the constants of Random123. Each call turns four
// words of counter into four random words, and Box & Muller (1958) turns those into four normals.
//
// Noise layout, version 1. Normal number e of sample number i is normal e % 4 of the call with
//   key     = seed, low word first
//   counter = { e / 4,  i % 2^32,  timestep,  stream + 2^16 (i / 2^32) }
// where e counts a sample's elements in logical (C, H, W) order, whatever the memory format.
// Another layout is another version and other pictures: it is a breaking change.
#pragma once

#include "portable.h"

namespace ddpm_fast {

constexpr int kNoiseLayoutVersion = 1;
constexpr int kNormalsPerCall = 4;

// Random123's factors and the steps of its keys.
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t x, y, z, w;
};

struct Normals {
  float x, y, z, w;
};

DDPM_HOST_DEVICE Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = multiply_words(kPhiloxFactor0, counter.x);
    const uint64_t product1 = multiply_words(kPhiloxFactor1, counter.z);
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(product0)};
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return counter;
}

// All of a counter but the element.
struct NoiseKey {
  uint32_t seed_low, seed_high, sample_low, timestep, stream_and_sample_high;

  DDPM_HOST_DEVICE NoiseKey(int64_t seed, int64_t sample_index, int64_t timestep, int64_t stream)
      : seed_low(static_cast<uint32_t>(seed)),
        seed_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        sample_low(static_cast<uint32_t>(sample_index)),
        timestep(static_cast<uint32_t>(timestep)),
        stream_and_sample_high((static_cast<uint32_t>(stream) & 0xffffu) |
                               static_cast<uint32_t>(static_cast<uint64_t>(sample_index) >> 32)
                                   << 16) {}

  DDPM_HOST_DEVICE Words words(uint32_t call) const {
    return philox4x32_10({call, sample_low, timestep, stream_and_sample_high}, seed_low, seed_high);
  }
};

// u = 2^exponent (1 + f), with sqrt(1/2) <= 1 + f < sqrt(2).
struct Uniform {
  float exponent, f;
};

// u = (floor(word / 2) + 1/2) 2^-31, rounded to float.
DDPM_HOST_DEVICE Uniform box_muller_uniform(uint32_t word) {
  const float u = fma(static_cast<float>(static_cast<int32_t>(word >> 1)), 0x1p-31f, 0x1p-32f);
  const int32_t bits_sqrt_half = 0x3f3504f3;
  const int32_t shifted = float_bits(u) - bits_sqrt_half;
  return {static_cast<float>(shifted >> 23),
          float_from_bits((shifted & 0x7fffff) + bits_sqrt_half) - 1.0f};
}

// -2 ln u
DDPM_HOST_DEVICE float box_muller_radius_squared(Uniform u) {
  const float f = u.f;
  // -2 ln(1 + f) = -2 f + f^2 + f^3 p(f), p by minimax
  float p = 0x1.38c9dep-3f;
  p = fma(p, f, -0x1.055ec6p-2f);
  p = fma(p, f, 0x1.0d8242p-2f);
  p = fma(p, f, -0x1.22d92ep-2f);
  p = fma(p, f, 0x1.54728ap-2f);
  p = fma(p, f, -0x1.99a01cp-2f);
  p = fma(p, f, 0x1.000226p-1f);
  p = fma(p, f, -0x1.555554p-1f);
  const float tail = f * fma(f * f, p, f);
  // -2 ln 2 in two parts, the first short enough for its product with the exponent to be exact;
  // the sum's rounding error is carried into the tail (fast two-sum).
  const float high = u.exponent * -0x1.62e4p+0f;
  const float sum = fma(-2.0f, f, high);
  const float error = fma(-2.0f, f, high - sum);
  return sum + (fma(u.exponent, -0x1.7f7d1cp-19f, error) + tail);
}

// sqrt(-2 ln u): the largest is 6.66.
DDPM_HOST_DEVICE float box_muller_radius(uint32_t word) {
  return square_root(box_muller_radius_squared(box_muller_uniform(word)));
}

// cos and sin of 2 pi a 2^-26, where a is the word's upper 26 bits.
DDPM_HOST_DEVICE void box_muller_direction(uint32_t word, float& cosine, float& sine) {
  // a = 2^24 (quadrant + y), with y in [-1/2, 1/2): the quadrant's two bits come to lie uppermost.
  const uint32_t quadrant = word + (1u << 29);
  const float y = static_cast<float>(static_cast<int32_t>(word << 2 & ~0xffu)) * 0x1p-32f;
  const float y2 = y * y;
  // sin(pi/2 y) and cos(pi/2 y) on [-1/2, 1/2], by minimax; pi/2 in two parts
  float s = -0x1.2ddcecp-8f;
  s = fma(s, y2, 0x1.46607ep-4f);
  s = fma(s, y2, -0x1.4abbc0p-1f);
  s = fma(s, y2, -0x1.777a5cp-25f);
  s = fma(y, 0x1.921fb6p+0f, s * y);
  float c = 0x1.d47d5ep-11f;
  c = fma(c, y2, -0x1.55b146p-6f);
  c = fma(c, y2, 0x1.03c1aep-2f);
  c = fma(c, y2, -0x1.3bd3ccp+0f);
  c = fma(c, y2, 1.0f);
  // A quarter turn ahead of the sine: the signs differ where the quadrant is odd.
  const uint32_t next_quadrant = quadrant + (1u << 30);
  const bool odd = static_cast<int32_t>(quadrant ^ next_quadrant) < 0;
  const uint32_t sign = 1u << 31;
  cosine = float_from_bits(float_bits(odd ? s : c) ^ (next_quadrant & sign));
  sine = float_from_bits(float_bits(odd ? c : s) ^ (quadrant & sign));
}

DDPM_HOST_DEVICE Normals normals(const NoiseKey& key, uint32_t call) {
  const Words words = key.words(call);
  const float radius0 = box_muller_radius(words.x);
  const float radius1 = box_muller_radius(words.z);
  float cosine0, sine0, cosine1, sine1;
  box_muller_direction(words.y, cosine0, sine0);
  box_muller_direction(words.w, cosine1, sine1);
  return {radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1};
}

}  // namespace ddpm_fast
