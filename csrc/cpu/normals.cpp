// Many calls of Philox4x32-10 side by side, and Box and Muller's transform of all their words.
#include "normals.h"

#include "lanes.h"
#include "simd.h"

namespace ddpm_fast::cpu {
namespace {

// Of the four words of a call, x and z become radii, y and w directions.
struct Pairs {
  uint32_t radii[2 * kMostCalls], directions[2 * kMostCalls];
};

#if defined(DDPM_LANES)

// So many vectors' chains of products run side by side as the registers of AVX2 can hold.
constexpr int kChains = 2;

template <int kBytes>
struct DrawWords {
  using Lane = Lanes<kBytes>;
  static constexpr int kLanes = kBytes / sizeof(uint32_t);
  static_assert(kMostCalls % (kLanes * kChains) == 0, "the last calls need not be told apart");

  static DDPM_INLINE void run(const NoiseKey& key, uint32_t first_call, int calls, Pairs& words) {
    Lane call, keys0[kPhiloxRounds], keys1[kPhiloxRounds];
    for (int i = 0; i < kLanes; ++i) call[i] = first_call + call_of_lane(i);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys0[round] = Lane{} + (key.seed_low + round * kPhiloxKeyStep0);
      keys1[round] = Lane{} + (key.seed_high + round * kPhiloxKeyStep1);
    }
    const Lane factor0 = broadcast<Lane>(kPhiloxFactor0), factor1 = broadcast<Lane>(kPhiloxFactor1);
    const Lane sample_low = broadcast<Lane>(key.sample_low);
    const Lane timestep = broadcast<Lane>(key.timestep);
    const Lane stream_and_sample_high = broadcast<Lane>(key.stream_and_sample_high);

    for (int i = 0; i < calls; i += kLanes * kChains) {
      Lane x[kChains], y[kChains], z[kChains], w[kChains];
      for (int c = 0; c < kChains; ++c) {
        x[c] = call + (i + c * kLanes);
        y[c] = sample_low;
        z[c] = timestep;
        w[c] = stream_and_sample_high;
      }
      DDPM_UNROLLED
      for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int c = 0; c < kChains; ++c) {
          // multiply() swaps lanes. What is made of z, x and y, has swapped them twice and is in
          // order; what is made of x, z and w, has swapped them once.
          Lane high0, low0, high1, low1;
          multiply(high0, low0, x[c], factor0);
          multiply(high1, low1, z[c], factor1);
          x[c] = high1 ^ (y[c] ^ keys0[round]);
          y[c] = low1;
          z[c] = high0 ^ (w[c] ^ keys1[round]);
          w[c] = low0;
        }
      }
      for (int c = 0; c < kChains; ++c) {
        const int first = 2 * (i + c * kLanes);
        store_in_turn(words.radii + first, x[c], z[c]);
        store_in_turn(words.directions + first, y[c], w[c]);
      }
    }
  }

  // So that store_in_turn(), which keeps to groups of four lanes, leaves the calls in order.
  static constexpr int call_of_lane(int i) { return i / 4 * 2 + i % 2 + i % 4 / 2 * kLanes / 2; }

  static DDPM_INLINE void store_in_turn(uint32_t* to, const Lane& a, const Lane& b_swapped) {
    Lane b, first, last;
    shuffle<MiddleSwapped>(b, b_swapped, b_swapped);
    shuffle<InTurn<0>>(first, a, b);
    shuffle<InTurn<1>>(last, a, b);
    memcpy(to, &first, sizeof first);
    memcpy(to + kLanes, &last, sizeof last);
  }
};

#else

template <int>
struct DrawWords {
  static DDPM_INLINE void run(const NoiseKey& key, uint32_t first_call, int calls, Pairs& words) {
    for (int i = 0; i < calls; ++i) {
      const Words w = key.words(first_call + i);
      words.radii[2 * i] = w.x;
      words.radii[2 * i + 1] = w.z;
      words.directions[2 * i] = w.y;
      words.directions[2 * i + 1] = w.w;
    }
  }
};

#endif

// In three loops, as a processor looks too few instructions ahead to hide the latency of one long
// chain of them. The square roots stand in the last one, where they cost nothing.
struct BoxMuller {
  static DDPM_INLINE void run(const Pairs& words, int calls, float* normals) {
    float exponent[2 * kMostCalls], g[2 * kMostCalls], squared[2 * kMostCalls];
    for (int i = 0; i < 2 * calls; ++i) {
      const Uniform u = box_muller_uniform(words.radii[i]);
      exponent[i] = u.scaled_exponent;
      g[i] = u.g;
    }
    for (int i = 0; i < 2 * calls; ++i) {
      squared[i] = box_muller_half_radius_squared({exponent[i], g[i]});
    }
    DDPM_INDEPENDENT
    for (int i = 0; i < 2 * calls; ++i) {
      float first, second;
      box_muller_pair(square_root(squared[i]), words.directions[i], first, second);
      normals[2 * i] = first;
      normals[2 * i + 1] = second;
    }
  }
};

}  // namespace

void draw_normals(const NoiseKey& key, uint32_t first_call, int calls, float* normals) {
  static const auto draw_words = best_of<DrawWords<64>, DrawWords<32>, DrawWords<16>,
                                         const NoiseKey&, uint32_t, int, Pairs&>();
  static const auto box_muller = best_version<BoxMuller, const Pairs&, int, float*>();
  Pairs words;
  draw_words(key, first_call, calls, words);
  box_muller(words, calls, normals);
}

}  // namespace ddpm_fast::cpu
