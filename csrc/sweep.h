// What sweeps over tokens share. What a mask leaves out may hold anything, NaN included: it is
// replaced before it meets a sum.
#pragma once

#include <cstdint>

#include "tokens.h"
#include "vector_math.h"

namespace fastrlhf {

// Tokens that are read into the first cache at a time.
constexpr std::int64_t kSweep = 256;

FASTRLHF_INLINE float kept(float x, std::uint8_t used) {
  // As integers: the compiler would branch on a choice between floats.
  // A bool that was bytes once may hold any of them.
  return as_float(as_bits(x) & (used ? ~0u : 0u));
}

// The sums of all chunks, in their order.
template <int kSums>
void add_up(const double* partial, std::int64_t chunks, double* sums) {
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0.0;
    for (std::int64_t k = 0; k < chunks; ++k) sums[i] += partial[k * kSums + i];
  }
}

inline std::int64_t chunks_of(std::int64_t n) { return (n + kChunk - 1) / kChunk; }

}  // namespace fastrlhf
