// block_sums of bfloat16 as they lie, two to a word. With AVX-512 by hand: compilers split the loop
// around the lower bound and keep one accumulator, which costs a quarter of the speed.

#include <cstring>
#include <limits>

#include "blocks.h"
#include "clones.h"
#include "vector_math.h"

#if defined(FASTRLHF_AVX512_BF16)
#include <immintrin.h>
#endif

namespace fastrlhf {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// `lowest` is a parameter for the reason given at kLowest.
FASTRLHF_CLONES
BlockSums portable_sums(const std::uint16_t* half, std::int64_t n, float base, float lowest) {
  float largest = -kInfinity, s = 0.0f, u = 0.0f;
  const std::int64_t pairs = n / 2;
#pragma omp simd reduction(max : largest) reduction(+ : s, u)
  for (std::int64_t j = 0; j < pairs; ++j) {
    std::uint32_t pair;
    std::memcpy(&pair, half + 2 * j, sizeof pair);
    const float x = as_float(pair << 16), y = as_float(pair & 0xffff0000u);
    const float higher = x > y ? x : y;
    largest = higher > largest ? higher : largest;
    const float dx = x - base, dy = y - base;
    const float bounded_x = lowest > dx ? lowest : dx, bounded_y = lowest > dy ? lowest : dy;
    const float ex = exp_term(bounded_x), ey = exp_term(bounded_y);
    s += ex + ey;
    u += ex * bounded_x + ey * bounded_y;
  }
  if (n % 2 == 0) return {largest, s, u};
  const float last = from_bfloat16(half[n - 1]);
  const BlockSums rest = block_sums(&last, 1, base, lowest);
  return {rest.max > largest ? rest.max : largest, s + rest.sum, u + rest.moment};
}

#if defined(FASTRLHF_AVX512_BF16)

#define FASTRLHF_AVX512 __attribute__((target("avx512f,avx512bw")))

constexpr std::int64_t kAhead = 1024;

struct Lanes {
  __m512 max, sum, moment;
};

// exp_term, in the same steps.
FASTRLHF_AVX512 FASTRLHF_INLINE __m512 exp_term(__m512 x) {
  const __m512 rounder = _mm512_set1_ps(12582912.0f);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504088896341f), rounder);
  const __m512 n = _mm512_sub_ps(shifted, rounder);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718246f), x);
  __m512 p = _mm512_set1_ps(8.290297351777554e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.189802333712578e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.666763722896576e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.999914765357971e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999997019767761e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

FASTRLHF_AVX512 FASTRLHF_INLINE void add_terms(__m512 z, __m512 base, Lanes& lanes) {
  // Of a number and a NaN, max_ps gives the second: a NaN is no maximum, but stays in the sums.
  lanes.max = _mm512_max_ps(z, lanes.max);
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(kLowest), _mm512_sub_ps(z, base));
  const __m512 e = exp_term(x);
  lanes.sum = _mm512_add_ps(lanes.sum, e);
  lanes.moment = _mm512_fmadd_ps(e, x, lanes.moment);
}

FASTRLHF_AVX512 BlockSums avx512_sums(const std::uint16_t* half, std::int64_t n, float base) {
  const __m512 zero = _mm512_setzero_ps(), subtracted = _mm512_set1_ps(base);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  Lanes even{_mm512_set1_ps(-kInfinity), zero, zero}, odd = even;
  const std::int64_t whole = n / 32 * 32;
  for (std::int64_t j = 0; j < whole; j += 32) {
    // One line for each that is summed; past the end of the rows it is no fault.
    _mm_prefetch(reinterpret_cast<const char*>(half + j + kAhead), _MM_HINT_T0);
    const __m512i pairs = _mm512_loadu_si512(half + j);
    add_terms(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), subtracted, even);
    add_terms(_mm512_castsi512_ps(_mm512_and_si512(pairs, upper)), subtracted, odd);
  }
  const BlockSums sums{_mm512_reduce_max_ps(_mm512_max_ps(even.max, odd.max)),
                       _mm512_reduce_add_ps(_mm512_add_ps(even.sum, odd.sum)),
                       _mm512_reduce_add_ps(_mm512_add_ps(even.moment, odd.moment))};
  if (whole == n) return sums;
  const BlockSums rest = portable_sums(half + whole, n - whole, base, kLowest);
  return {rest.max > sums.max ? rest.max : sums.max, sums.sum + rest.sum,
          sums.moment + rest.moment};
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

#endif

}  // namespace

BlockSums block_sums_bfloat16(const std::uint16_t* half, std::int64_t n, float base) {
#if defined(FASTRLHF_AVX512_BF16)
  static const bool by_hand = has_avx512();
  if (by_hand) return avx512_sums(half, n, base);
#endif
  return portable_sums(half, n, base, kLowest);
}

}  // namespace fastrlhf
