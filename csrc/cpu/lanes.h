// Vectors of 32-bit words, as many as fit into kBytes, where the compiler has such types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DDPM_LANES_ASM
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "simd.h"

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define DDPM_LANES

namespace ddpm_fast::cpu {

template <class T, int kBytes>
using Vector __attribute__((vector_size(kBytes))) = T;

template <int kBytes>
using Lanes = Vector<uint32_t, kBytes>;

template <class Lane>
DDPM_INLINE Lane broadcast(uint32_t number) {
  Lane lanes = Lane{} + number;
#if defined(DDPM_LANES_ASM)
  asm("" : "+v"(lanes));  // GCC 12 would fill the lanes anew, one by one, wherever they are used
#endif
  return lanes;
}

// Lanes of a and b, those of b numbered on from those of a: Order::lane(i, lanes of a) in lane i.
template <class Order, class Lane, size_t... i>
DDPM_INLINE void shuffle(Lane& result, const Lane& a, const Lane& b, std::index_sequence<i...>) {
  constexpr int kCount = sizeof...(i);
  // As floats, since AVX2 has the shuffle of two operands for those only.
  using Floats = Vector<float, sizeof(Lane)>;
#if defined(__clang__)
  result = (Lane)__builtin_shufflevector((Floats)a, (Floats)b, Order::lane(i, kCount)...);
#else
  result = (Lane)__builtin_shuffle((Floats)a, (Floats)b, Lane{Order::lane(i, kCount)...});
#endif
}

template <class Order, class Lane>
DDPM_INLINE void shuffle(Lane& result, const Lane& a, const Lane& b) {
  shuffle<Order>(result, a, b, std::make_index_sequence<sizeof(Lane) / sizeof(uint32_t)>());
}

// Of each four lanes the even ones, or the odd ones, of a and then of b.
template <int kOdd>
struct EveryOther {
  static constexpr unsigned lane(unsigned i, unsigned count) {
    return i / 4 * 4 + i % 2 * 2 + kOdd + i % 4 / 2 * count;
  }
};

// Of each four lanes the first two, or the last two, of a and b in turn.
template <int kLast>
struct InTurn {
  static constexpr unsigned lane(unsigned i, unsigned count) {
    return i / 4 * 4 + i % 4 / 2 + kLast * 2 + i % 2 * count;
  }
};

// Lanes 0, 2, 1, 3 of each four.
struct MiddleSwapped {
  static constexpr unsigned lane(unsigned i, unsigned) {
    return i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i;
  }
};

template <int kOdd, class Lane>
DDPM_INLINE void every_other(Lane& result, const Lane& a, const Lane& b) {
#if defined(DDPM_LANES_ASM)
  if constexpr (sizeof(Lane) > sizeof(__m128i)) {
    // The shuffle above makes GCC compute the words around it as floats, too, which costs a tenth.
    constexpr int kSelect = kOdd ? 0b11011101 : 0b10001000;
    asm("vshufps %3, %2, %1, %0" : "=v"(result) : "v"(a), "vm"(b), "i"(kSelect));
    return;
  }
#endif
  shuffle<EveryOther<kOdd>>(result, a, b);
}

// The products of the even lanes, as numbers of 64 bits.
template <class Lane>
DDPM_INLINE void multiply_even(Lane& product, const Lane& a, const Lane& b) {
#if defined(DDPM_LANES_ASM)
  if constexpr (sizeof(Lane) == sizeof(__m128i)) {
    product = (Lane)_mm_mul_epu32((__m128i)a, (__m128i)b);
  } else {
    // An intrinsic cannot be inlined here, where the wider instruction set is yet to be chosen.
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "vm"(b));
  }
#else
#if defined(__ARM_NEON)
  if constexpr (sizeof(Lane) == sizeof(uint64x2_t)) {
    product = (Lane)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
    return;
  }
#endif
  using Wide = Vector<uint64_t, sizeof(Lane)>;
  product = (Lane)(((Wide)a & 0xffffffffu) * ((Wide)b & 0xffffffffu));
#endif
}

// The two halves of the products of all lanes, in the order 0, 2, 1, 3 within each four lanes: so
// a single shuffle brings each half out of the products of the even lanes and of the odd ones.
template <class Lane>
DDPM_INLINE void multiply(Lane& high, Lane& low, const Lane& a, const Lane& b) {
  Lane even, odd;
  multiply_even(even, a, b);
  multiply_even(odd, (Lane)((Vector<uint64_t, sizeof(Lane)>)a >> 32), b);
  every_other<1>(high, even, odd);
  every_other<0>(low, even, odd);
}

}  // namespace ddpm_fast::cpu

#endif
