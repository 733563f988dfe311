// The vector loops, each over one block of a row. They are compiled once per SIMD level and picked
// at run time; every op calls the same ones, so a row gives the same bits in all of them.
#pragma once

#include <cstdint>

namespace fastrlhf {

// Columns per block: sums run in float32 inside a block and in double across blocks.
constexpr std::int64_t kBlock = 1024;

// The type of numbers that a caller owns; arithmetic is in float32.
enum class Type : int { kFloat32, kBFloat16, kFloat16 };

inline std::int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

struct Transform {
  const float* bias;   // per column, or null
  float logit_scale;
  float softcap;       // 0: none
  float temperature;

  bool is_identity() const {
    return !bias && logit_scale == 1.0f && softcap == 0.0f && temperature == 1.0f;
  }
};

struct GradientRow {
  float max, log_sum, ref_max, ref_log_sum;
  float constant, on_logprob, on_ref_logprob;  // A, B, C of docs/math.md, section 2
  float reverse;                               // coefficient of P - P_ref
  float scale, cap_slope;                      // cap_slope: temperature / softcap, or 0
};

// Ask for row[start ... start + n] to be brought near; it may lie past the end.
inline void block_prefetch(const void* row, Type type, std::int64_t start, std::int64_t n) {
#if defined(__GNUC__)
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(row) + start * size_of(type);
  for (std::int64_t at = 0; at < n * size_of(type); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + at), 0, 2);
#else
  (void)row, (void)type, (void)start, (void)n;
#endif
}

// z <- row[start ... start + n], raised to float32, and row[start ... start + n] <- z, rounded
void block_read(const void* row, Type type, std::int64_t start, std::int64_t n, float* z);
void block_write(const float* z, std::int64_t n, void* row, Type type, std::int64_t start);

// z <- softcap * tanh(logit_scale * (z + bias) / softcap) / temperature
void block_transform(float* z, std::int64_t n, std::int64_t offset, const Transform& transform);

struct BlockSums {
  float max;          // of z; -inf where there is nothing above it
  float sum, moment;  // of e = exp(z - base), and of e * (z - base): right if max <= base + 88
};

// What exp_term still holds. A parameter, because compilers split the loop where they know it.
constexpr float kLowest = -87.3f;

// Below `lowest` exp counts as that of it, which is next to nothing: finite numbers keep 0 * inf out
// of the moment.
BlockSums block_sums(const float* z, std::int64_t n, float base, float lowest = kLowest);

// block_sums of bfloat16 as they lie, two to a word: half of the loads, and no copy in float32.
BlockSums block_sums_bfloat16(const std::uint16_t* half, std::int64_t n, float base);

// sum of z, and of exp(z - base)^2
void block_extras(const float* z, std::int64_t n, float base, float* total, float* squares);

// e <- exp(z - base), exactly 0 where it is below e^-87.3
void block_exp(const float* z, std::int64_t n, float base, float* e);

double block_total(const float* e, std::int64_t n);

// sum of e * ((x - x_base) - (y - y_base)), with e = exp(x - x_base)
float block_cross(const float* x, float x_base, const float* y, float y_base, std::int64_t n);

// z <- P * (A + B * l + C * l_ref) + reverse * (P - P_ref), times scale and the slope of the cap
void block_gradient(float* z, const float* ref, std::int64_t n, const GradientRow& row);

}  // namespace fastrlhf
