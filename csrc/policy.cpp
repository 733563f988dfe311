// The policy losses of docs/math.md, section 3, with their statistics and derivatives.

#include <algorithm>
#include <cstring>
#include <limits>

#include "clones.h"
#include "sweep.h"
#include "tokens.h"
#include "vector_math.h"

namespace fastrlhf {

namespace {

// e^x within a few ulp of double; 0 below -708, e^709 above 709, NaN for NaN.
FASTRLHF_INLINE double exp_wide(double x) {
  // As exp_small: adding 1.5 * 2^52 rounds to an integer in the low bits.
  const double rounder = 6755399441055744.0;
  const double raised = x < -708.0 ? -708.0 : x;
  const double bounded = raised > 709.0 ? 709.0 : raised;
  const double shifted = bounded * 1.4426950408889634 + rounder;
  const double n = shifted - rounder;
  const double r = (bounded - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -708.0 ? 0.0 : p * power;
}

struct TokenLoss {
  double loss, slope;
};

// docs/math.md, section 3, and the derivative in the log-probability
template <Loss kLoss>
FASTRLHF_INLINE TokenLoss token_loss(const PolicySpec& spec, double logprob, double log_ratio,
                                     double ratio, double advantage, bool clipped) {
  if (kLoss == Loss::kReinforce) return {-logprob * advantage, -advantage};
  const double raised = ratio < spec.low ? spec.low : ratio;
  const double bound = raised > spec.high ? spec.high : raised;
  if (kLoss == Loss::kCispo) return {-bound * advantage * logprob, -bound * advantage};
  if (kLoss == Loss::kPpoKl) {
    // A coefficient of 0 leaves out what may be infinite.
    const bool is_on = spec.old_kl_coef != 0.0;
    const double penalty = is_on ? spec.old_kl_coef * (ratio - 1.0 - log_ratio) : 0.0;
    const double pull = is_on ? spec.old_kl_coef * (ratio - 1.0) : 0.0;
    return {penalty - ratio * advantage, pull - ratio * advantage};
  }
  const bool beyond = (advantage < 0.0) & (ratio > spec.dual_clip);
  const double fixed = beyond ? spec.dual_clip : bound;
  const bool live = !(clipped | beyond);
  return {-(live ? ratio : fixed) * advantage, live ? -ratio * advantage : 0.0};
}

// What the formulas read of each token, 0 where the mask leaves it out.
struct PolicyBlock {
  alignas(64) float logprob[kSweep], gap[kSweep], advantage[kSweep], weight[kSweep];
  alignas(64) float log_ratio[kSweep], from_ref[kSweep], entropy[kSweep], kl[kSweep];
  alignas(64) float slope[kSweep];
  alignas(64) double token_ratio[kSweep], ratio[kSweep], estimate[kSweep], estimate_slope[kSweep];
};

// x - y where the mask keeps it; without an x, `missing`.
FASTRLHF_CLONES
void masked_read(const float* x, const float* y, const std::uint8_t* mask, std::int64_t n,
                 float missing, float* out) {
  if (!x) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) out[j] = kept(missing, mask[j]);
  } else if (!y) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) out[j] = kept(x[j], mask[j]);
  } else {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) out[j] = kept(x[j] - y[j], mask[j]);
  }
}

FASTRLHF_CLONES
void exp_block(const float* x, std::int64_t n, double* out) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) out[j] = exp_wide(x[j]);
}

// k2 or k3 of logprob - ref_logprob, and its derivative
FASTRLHF_CLONES
void estimate_block(const float* from_ref, std::int64_t n, bool k2, double* estimate,
                    double* slope) {
  if (k2) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      const double gap = from_ref[j];
      estimate[j] = gap * gap / 2.0;
      slope[j] = gap;
    }
    return;
  }
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const double gap = from_ref[j], decay = exp_wide(-gap);
    estimate[j] = decay - 1.0 + gap;
    slope[j] = 1.0 - decay;
  }
}

template <Loss kLoss>
FASTRLHF_INLINE void policy_block(PolicyBlock& b, std::int64_t n, const PolicySpec& given,
                                  bool reports_estimate, double* sums) {
  const PolicySpec spec = given;
  const bool exact = spec.estimator == KlEstimator::kExact;
  const bool on_entropy = spec.entropy_coef != 0.0, on_kl = exact && spec.kl_coef != 0.0;
  const double on_estimate = exact ? 0.0 : spec.kl_coef;
  double loss = 0.0, approx_kl = 0.0, clips = 0.0, ratios = 0.0, entropies = 0.0, kls = 0.0;
  for (std::int64_t j = 0; j < n; ++j) {
    const double gap = b.gap[j], advantage = b.advantage[j], weight = b.weight[j];
    const double log_ratio = kLoss == Loss::kGspo ? b.log_ratio[j] : b.gap[j];
    const double ratio = kLoss == Loss::kGspo ? b.ratio[j] : b.token_ratio[j];
    const bool above = (advantage > 0.0) & (ratio > spec.high);
    const bool clipped = above | ((advantage < 0.0) & (ratio < spec.low));
    TokenLoss token = token_loss<kLoss>(spec, b.logprob[j], log_ratio, ratio, advantage, clipped);
    const double entropy = b.entropy[j], kl = b.kl[j];
    token.loss -= on_entropy ? spec.entropy_coef * entropy : 0.0;
    token.loss += on_kl ? spec.kl_coef * kl : 0.0;
    token.loss += on_estimate != 0.0 ? on_estimate * b.estimate[j] : 0.0;
    token.slope += on_estimate != 0.0 ? on_estimate * b.estimate_slope[j] : 0.0;
    loss += weight * token.loss;
    approx_kl += weight * (b.token_ratio[j] - 1.0 - gap);
    clips += clipped ? weight : 0.0;
    ratios += weight * ratio;
    entropies += weight * entropy;
    kls += weight * (reports_estimate ? b.estimate[j] : kl);
    b.slope[j] = static_cast<float>(weight * token.slope);
  }
  const double all[kPolicySums] = {loss, approx_kl, clips, ratios, entropies, kls};
  for (int i = 0; i < kPolicySums; ++i) sums[i] += all[i];
}

FASTRLHF_CLONES
void policy_sweep(PolicyBlock& block, std::int64_t n, const PolicySpec& spec,
                  bool reports_estimate, double* sums) {
  switch (spec.loss) {
    case Loss::kPpoClip:
      return policy_block<Loss::kPpoClip>(block, n, spec, reports_estimate, sums);
    case Loss::kPpoKl:
      return policy_block<Loss::kPpoKl>(block, n, spec, reports_estimate, sums);
    case Loss::kCispo:
      return policy_block<Loss::kCispo>(block, n, spec, reports_estimate, sums);
    case Loss::kGspo:
      return policy_block<Loss::kGspo>(block, n, spec, reports_estimate, sums);
    case Loss::kReinforce:
      return policy_block<Loss::kReinforce>(block, n, spec, reports_estimate, sums);
  }
}

void policy_chunk(const PolicyRows& rows, const PolicySpec& spec, std::int64_t begin,
                  std::int64_t end, float* slopes, double* sums) {
  const float unknown = std::numeric_limits<float>::quiet_NaN();
  // The report prefers the exact KL, whatever the loss has.
  const bool reports_estimate = rows.ref_logprobs && !rows.kl;
  const bool k2 = spec.estimator == KlEstimator::kK2;
  std::fill_n(sums, kPolicySums, 0.0);
  PolicyBlock block{};
  for (std::int64_t start = begin; start < end; start += kSweep) {
    const std::int64_t n = std::min(kSweep, end - start);
    const auto read = [&](const float* x, const float* y, float missing, float* out) {
      masked_read(x ? x + start : x, y ? y + start : y, rows.mask + start, n, missing, out);
    };
    read(rows.logprobs, nullptr, 0.0f, block.logprob);
    read(rows.logprobs, rows.old_logprobs, 0.0f, block.gap);
    read(rows.advantages, nullptr, 0.0f, block.advantage);
    read(rows.weights, nullptr, 1.0f, block.weight);
    read(rows.entropy, nullptr, unknown, block.entropy);
    read(rows.kl, nullptr, unknown, block.kl);
    exp_block(block.gap, n, block.token_ratio);
    if (spec.loss == Loss::kGspo) {
      read(rows.sequence_log_ratios, nullptr, 0.0f, block.log_ratio);
      exp_block(block.log_ratio, n, block.ratio);
    }
    if (rows.ref_logprobs) {
      read(rows.logprobs, rows.ref_logprobs, 0.0f, block.from_ref);
      estimate_block(block.from_ref, n, k2, block.estimate, block.estimate_slope);
    }
    policy_sweep(block, n, spec, reports_estimate, sums);
    if (slopes) std::copy_n(block.slope, n, slopes + start);
  }
}

}  // namespace

void policy_rows(const PolicyRows& rows, const PolicySpec& spec, float* slopes, double* partial,
                 double* sums, int threads) {
  const std::int64_t chunks = chunks_of(rows.n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < chunks; ++k) {
    const std::int64_t start = k * kChunk;
    policy_chunk(rows, spec, start, std::min(start + kChunk, rows.n), slopes,
                 partial + kPolicySums * k);
  }
  add_up<kPolicySums>(partial, chunks, sums);
}

}  // namespace fastrlhf
