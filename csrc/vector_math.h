// Elementary functions and conversions without branches or calls, so that the loops around them
// vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define FASTRLHF_INLINE inline __attribute__((always_inline))
#define FASTRLHF_NOINLINE __attribute__((noinline))
#else
#define FASTRLHF_INLINE inline
#define FASTRLHF_NOINLINE
#endif

namespace fastrlhf {

// e^x for x <= 88, within 2 ulp; exactly 0 below -87.3 (so for -inf), NaN for NaN.
FASTRLHF_INLINE float exp_small(float x) {
  // Adding 1.5 * 2^23 rounds to the nearest integer in the low mantissa bits.
  const float rounder = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + rounder;
  const float n = shifted - rounder;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // The integer sits in the low bits of `shifted`; moved up it is the exponent of 2^n.
  bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) + 127u);
  bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  const float value = p * power;
  return x < -87.3f ? 0.0f : value;
}

// e^x for -87.3 <= x <= 88, within 3 ulp; NaN for NaN. Cheaper, for sums of many such terms: a shorter
// polynomial, a step of ln 2 that is exact with a fused multiply-add, and n added to the exponent.
FASTRLHF_INLINE float exp_term(float x) {
  const float rounder = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + rounder;
  const float n = shifted - rounder;
  const float r = x - n * 0.69314718246f;
  float p = 8.290297351777554e-3f;
  p = p * r + 4.189802333712578e-2f;
  p = p * r + 1.666763722896576e-1f;
  p = p * r + 4.999914765357971e-1f;
  p = p * r + 9.999997019767761e-1f;
  p = p * r + 1.0f;
  std::uint32_t bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// tanh within 3 ulp: a polynomial near 0, where 1 - 2/(e^2x + 1) would cancel.
FASTRLHF_INLINE float tanh_small(float x) {
  const float size = x < 0.0f ? -x : x;
  const float e = exp_small(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float signed_far = x < 0.0f ? -far : far;
  return size < 0.625f ? near : signed_far;
}

FASTRLHF_INLINE float as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTRLHF_INLINE std::uint32_t as_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTRLHF_INLINE float from_bfloat16(std::uint16_t half) {
  return as_float(static_cast<std::uint32_t>(half) << 16);
}

// To the nearest, ties to even, as all conversions here.
FASTRLHF_INLINE std::uint16_t to_bfloat16(float x) {
  const std::uint32_t bits = as_bits(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

FASTRLHF_INLINE float from_float16(std::uint16_t half) {
  // The multiplication moves the exponent's bias from 15 to 127, for subnormal numbers as well.
  const float size = as_float((half & 0x7fffu) << 13) * 5.192296858534828e33f;  // 2^112
  const std::uint32_t not_finite = size >= 65536.0f ? 0x7f800000u : 0u;
  return as_float(as_bits(size) | not_finite | (half & 0x8000u) << 16);
}

FASTRLHF_INLINE std::uint16_t to_float16(float x) {
  const std::uint32_t sign = as_bits(x) & 0x80000000u, bits = as_bits(x) ^ sign;
  // The exponent's bias moves from 127 to 15; a carry out of the mantissa belongs into it.
  const std::uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal number's bits, rounded, at the low end of the mantissa.
  const std::uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
  const std::uint32_t beyond = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = bits < (113u << 23) ? subnormal : normal;
  return static_cast<std::uint16_t>((bits >= (143u << 23) ? beyond : finite) | sign >> 16);
}

}  // namespace fastrlhf
