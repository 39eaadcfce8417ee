// Philox4x32-10 in lanes of 64 bits, a call a lane. A round multiplies 32 bits by 32 into 64, and
// there is an instruction for just that on every machine; in lanes of 32 bits it would have to be
// made of two such products and the shuffles between them.
//
// Of the four words of a call, x and z become radii and y and w directions, each such pair kept in
// one lane; Box and Muller's transform then reads them as one long row of 32-bit words.
#include "normals.h"

#include "simd.h"

namespace ddpm_fast::cpu {
namespace {

struct Pairs {
  uint32_t radii[2 * kMostCalls], directions[2 * kMostCalls];
};

#if defined(DDPM_LANES)

// So many calls' chains of products run side by side as hide each other's latency.
constexpr int kChains = 4;

template <int kBytes>
DDPM_INLINE void draw_words(const NoiseKey& key, uint32_t first_call, int calls, Pairs& words) {
  using Lane = Lanes<kBytes>;
  constexpr int kLanes = kBytes / sizeof(uint64_t);
  static_assert(kMostCalls % (kLanes * kChains) == 0, "the last calls need not be told apart");
  Lane lane_number, keys0[kPhiloxRounds], keys1[kPhiloxRounds];
  for (int i = 0; i < kLanes; ++i) lane_number[i] = i;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys0[round] = Lane{} + (key.seed_low + round * kPhiloxKeyStep0);
    keys1[round] = Lane{} + (key.seed_high + round * kPhiloxKeyStep1);
  }
  const Lane factor0 = broadcast<Lane>(kPhiloxFactor0), factor1 = broadcast<Lane>(kPhiloxFactor1);
  const Lane low = broadcast<Lane>(0xffffffffu);
  const Lane sample_low = broadcast<Lane>(key.sample_low);
  const Lane timestep = broadcast<Lane>(key.timestep);
  const Lane stream_and_sample_high = broadcast<Lane>(key.stream_and_sample_high);

  for (int i = 0; i < calls; i += kLanes * kChains) {
    // Only the lower half of a lane counts; what a product leaves in the upper is never read.
    Lane x[kChains], y[kChains], z[kChains], w[kChains];
    for (int c = 0; c < kChains; ++c) {
      x[c] = lane_number + (first_call + i + c * kLanes);
      y[c] = sample_low;
      z[c] = timestep;
      w[c] = stream_and_sample_high;
    }
    DDPM_UNROLLED
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int c = 0; c < kChains; ++c) {
        Lane product0, product1;
        multiply_low_halves(product0, x[c], factor0);
        multiply_low_halves(product1, z[c], factor1);
        x[c] = (product1 >> 32) ^ y[c] ^ keys0[round];
        y[c] = product1;
        z[c] = (product0 >> 32) ^ w[c] ^ keys1[round];
        w[c] = product0;
      }
    }
    for (int c = 0; c < kChains; ++c) {
      const Lane radii = (x[c] & low) | (z[c] << 32), directions = (y[c] & low) | (w[c] << 32);
      const int first = 2 * (i + c * kLanes);
      memcpy(words.radii + first, &radii, sizeof radii);
      memcpy(words.directions + first, &directions, sizeof directions);
    }
  }
}

#else

template <int kBytes>
DDPM_INLINE void draw_words(const NoiseKey& key, uint32_t first_call, int calls, Pairs& words) {
  for (int i = 0; i < calls; ++i) {
    const Words w = key.words(first_call + i);
    words.radii[2 * i] = w.x;
    words.radii[2 * i + 1] = w.z;
    words.directions[2 * i] = w.y;
    words.directions[2 * i + 1] = w.w;
  }
}

#endif

template <int kBytes>
struct DrawNormals {
  static DDPM_INLINE void run(const NoiseKey& key, uint32_t first_call, int calls, float* normals) {
    Pairs words;
    draw_words<kBytes>(key, first_call, calls, words);
    // In two loops, as the constants of both do not fit into the registers of AVX2.
    float radii[2 * kMostCalls];
    for (int i = 0; i < 2 * calls; ++i) radii[i] = box_muller_radius(words.radii[i]);
    DDPM_INDEPENDENT
    for (int i = 0; i < 2 * calls; ++i) {
      float cosine, sine;
      box_muller_direction(words.directions[i], cosine, sine);
      normals[2 * i] = radii[i] * cosine;
      normals[2 * i + 1] = radii[i] * sine;
    }
  }
};

}  // namespace

void draw_normals(const NoiseKey& key, uint32_t first_call, int calls, float* normals) {
  static const auto run = best_of<DrawNormals<64>, DrawNormals<32>, DrawNormals<16>,
                                  const NoiseKey&, uint32_t, int, float*>();
  run(key, first_call, calls, normals);
}

}  // namespace ddpm_fast::cpu
