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

// u = 2^exponent (1 + f), with sqrt(1/2) <= 1 + f < sqrt(2). Held as 2^23 exponent and g = -f / 2,
// what the radius squared is made of in the fewest instructions.
struct Uniform {
  float scaled_exponent, g;
};

// u = (floor(word / 2) + 1/2) 2^-31, rounded to float.
DDPM_HOST_DEVICE Uniform box_muller_uniform(uint32_t word) {
  const float u = fma(static_cast<float>(static_cast<int32_t>(word >> 1)), 0x1p-31f, 0x1p-32f);
  const int32_t bits_sqrt_half = 0x3f3504f3;
  const int32_t exponent = (float_bits(u) - bits_sqrt_half) & ~0x7fffff;
  const float one_plus_f = float_from_bits(float_bits(u) - exponent);
  return {static_cast<float>(exponent), fma(one_plus_f, -0.5f, 0.5f)};
}

// -1/2 ln u, the square of half the radius
DDPM_HOST_DEVICE float box_muller_half_radius_squared(Uniform u) {
  const float g = u.g;
  // -1/2 ln(1 + f) = g + g^2 + g^3 p(g), p by minimax
  float p = 0x1.38c9dep+5f;
  p = fma(p, g, 0x1.055ec6p+5f);
  p = fma(p, g, 0x1.0d8242p+4f);
  p = fma(p, g, 0x1.22d92ep+3f);
  p = fma(p, g, 0x1.54728ap+2f);
  p = fma(p, g, 0x1.99a01cp+1f);
  p = fma(p, g, 0x1.000226p+1f);
  p = fma(p, g, 0x1.555554p+0f);
  const float tail = g * fma(g * g, p, g);
  // -1/2 ln 2, by 2^-23, in two parts, the first short enough for its product with the exponent to
  // be exact; the sum's rounding error is carried into the tail (fast two-sum).
  const float high = -0x1.62e4p-25f, low = -0x1.7f7d1cp-44f;
  const float sum = fma(u.scaled_exponent, high, g);
  const float error = fma(u.scaled_exponent, high, -sum) + g;
  return sum + (fma(u.scaled_exponent, low, error) + tail);
}

// Half of sqrt(-2 ln u), the radius: at most 3.33.
DDPM_HOST_DEVICE float box_muller_half_radius(uint32_t word) {
  return square_root(box_muller_half_radius_squared(box_muller_uniform(word)));
}

// The radius times cos and sin of 2 pi a 2^-26, where a is the word's upper 26 bits.
DDPM_HOST_DEVICE void box_muller_pair(float half_radius, uint32_t word, float& first,
                                      float& second) {
  // a = 2^24 (quadrant + y), with y in [-1/2, 1/2): the quadrant's two bits come to lie uppermost.
  const uint32_t quadrant = word + (1u << 29);
  const float y = static_cast<float>(static_cast<int32_t>(word << 2 & ~0xffu)) * 0x1p-32f;
  const float y2 = y * y;
  // 2 sin(pi/2 y) and 2 cos(pi/2 y) on [-1/2, 1/2], by minimax; pi in two parts
  float s = -0x1.2ddcecp-7f;
  s = fma(s, y2, 0x1.46607ep-3f);
  s = fma(s, y2, -0x1.4abbc0p+0f);
  s = fma(s, y2, -0x1.777a5cp-24f);
  s = fma(y, 0x1.921fb6p+1f, s * y);
  float c = 0x1.d47d5ep-10f;
  c = fma(c, y2, -0x1.55b146p-5f);
  c = fma(c, y2, 0x1.03c1aep-1f);
  c = fma(c, y2, -0x1.3bd3ccp+1f);
  c = fma(c, y2, 2.0f);
  // Half a turn changes both signs, a quarter of one makes of (c, s) the pair (-s, c).
  const float radius = float_from_bits(float_bits(half_radius) ^ (quadrant & 1u << 31));
  const bool odd = has_bit(quadrant, 30);
  first = radius * (odd ? -s : c);
  second = radius * (odd ? c : s);
}

DDPM_HOST_DEVICE Normals normals(const NoiseKey& key, uint32_t call) {
  const Words words = key.words(call);
  const float half_radius0 = box_muller_half_radius(words.x);
  const float half_radius1 = box_muller_half_radius(words.z);
  Normals n;
  box_muller_pair(half_radius0, words.y, n.x, n.y);
  box_muller_pair(half_radius1, words.w, n.z, n.w);
  return n;
}

}  // namespace ddpm_fast
