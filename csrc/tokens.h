// Losses, advantages and whitening of one number a token: each in one sweep, in double inside.
#pragma once

#include <cstdint>

namespace fastrlhf {

// Masks are bytes, 1 or 0: loops over bool do not vectorise.

// Tokens per partial sum. Partial sums are added in their order, whatever the threads.
constexpr std::int64_t kChunk = 4096;

void gae(const float* rewards, const float* values, const std::uint8_t* mask, std::int64_t rows,
         std::int64_t columns, double gamma, double lam, float* advantages, float* returns,
         int threads);

// partial: 2 doubles a chunk, two sweeps
void whiten(const float* x, const std::uint8_t* mask, std::int64_t n, bool center, double* partial,
            float* out, int threads);

struct ValueRows {
  const float *values, *old_values, *returns;
  const std::uint8_t* mask;
  std::int64_t n;
  double cliprange;  // infinity: no clipping
};

constexpr int kValueSums = 2;  // 2 * loss, clipped

// gradient: of the sum of losses in the values, or null. partial: kValueSums doubles a chunk.
void value_rows(const ValueRows& rows, float* gradient, double* partial, double* sums,
                int threads);

enum class Loss : int { kPpoClip, kPpoKl, kCispo, kGspo, kReinforce };
enum class KlEstimator : int { kExact, kK2, kK3 };

struct PolicySpec {
  Loss loss;
  KlEstimator estimator;
  double low, high, dual_clip;  // bounds of the ratio; dual_clip may be infinity
  double kl_coef, old_kl_coef, entropy_coef;
};

struct PolicyRows {
  const float *logprobs, *old_logprobs, *advantages;
  const std::uint8_t* mask;
  std::int64_t n;
  const float *entropy, *kl, *ref_logprobs;       // each may be null
  const float *weights, *sequence_log_ratios;     // null: 1; null but for gspo
};

constexpr int kPolicySums = 6;  // loss, approx_kl, clipped, ratio, entropy, kl

// slopes: of the sum of losses in the log-probabilities, or null.
// partial: kPolicySums doubles a chunk.
void policy_rows(const PolicyRows& rows, const PolicySpec& spec, float* slopes, double* partial,
                 double* sums, int threads);

}  // namespace fastrlhf
