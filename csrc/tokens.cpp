// Advantages, whitening and the value loss.

#include "tokens.h"

#include <algorithm>
#include <cmath>

#include "clones.h"
#include "sweep.h"

namespace fastrlhf {

namespace {

// Count and sum where there is no mean yet; 0 and the sum of squares around it where there is.
FASTRLHF_CLONES
void moment_chunk(const float* x, const std::uint8_t* mask, std::int64_t n, const double* mean,
                  double* sums) {
  double count = 0.0, sum = 0.0;
  if (mean) {
    const double center = *mean;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < n; ++j) {
      const double d = x[j] - center;
      sum += mask[j] ? d * d : 0.0;
    }
  } else {
#pragma omp simd reduction(+ : count, sum)
    for (std::int64_t j = 0; j < n; ++j) {
      const double given = x[j];
      count += mask[j] ? 1.0 : 0.0;
      sum += mask[j] ? given : 0.0;
    }
  }
  sums[0] = count;
  sums[1] = sum;
}

FASTRLHF_CLONES
void scale_chunk(const float* x, const std::uint8_t* mask, std::int64_t n, double mean, double rstd,
                 double offset, float* out) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    out[j] = kept(static_cast<float>((x[j] - mean) * rstd + offset), mask[j]);
  }
}

FASTRLHF_CLONES
void value_block(const ValueRows& rows, std::int64_t start, std::int64_t n, float* gradient,
                 double* sums) {
  const float *values = rows.values + start, *old_values = rows.old_values + start;
  const float* returns = rows.returns + start;
  const std::uint8_t* mask = rows.mask + start;
  const double range = rows.cliprange;
  double error = 0.0, clipped = 0.0;
#pragma omp simd reduction(+ : error, clipped)
  for (std::int64_t j = 0; j < n; ++j) {
    const double v = values[j], low = old_values[j] - range, high = old_values[j] + range;
    const double raised = v < low ? low : v;
    const double bounded = raised > high ? high : raised;
    const double own = v - returns[j], other = bounded - returns[j];
    const bool by_clip = other * other > own * own;
    const double larger = by_clip ? other * other : own * own;
    const double clip = by_clip ? 1.0 : 0.0;
    error += mask[j] ? larger : 0.0;
    clipped += mask[j] ? clip : 0.0;
    // Where the clipped error is the larger one, the value is outside of its range.
    gradient[j] = kept(by_clip ? 0.0f : static_cast<float>(own), mask[j]);
  }
  sums[0] += error;
  sums[1] += clipped;
}

void value_chunk(const ValueRows& rows, std::int64_t begin, std::int64_t end, float* gradient,
                 double* sums) {
  std::fill_n(sums, kValueSums, 0.0);
  float unwanted[kSweep];
  for (std::int64_t start = begin; start < end; start += kSweep) {
    const std::int64_t n = std::min(kSweep, end - start);
    value_block(rows, start, n, gradient ? gradient + start : unwanted, sums);
  }
}

}  // namespace

void gae(const float* rewards, const float* values, const std::uint8_t* mask, std::int64_t rows,
         std::int64_t columns, double gamma, double lam, float* advantages, float* returns,
         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < rows; ++i) {
    double next_value = 0.0, next_advantage = 0.0;
    for (std::int64_t t = (i + 1) * columns - 1; t >= i * columns; --t) {
      advantages[t] = returns[t] = 0.0f;
      // A masked token is skipped: what lies before it sees what lies after it.
      if (!mask[t]) continue;
      next_advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage;
      next_value = values[t];
      advantages[t] = static_cast<float>(next_advantage);
      returns[t] = static_cast<float>(next_advantage + next_value);
    }
  }
}

void whiten(const float* x, const std::uint8_t* mask, std::int64_t n, bool center, double* partial,
            float* out, int threads) {
  const std::int64_t chunks = chunks_of(n);
  double sums[2];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < chunks; ++k) {
    const std::int64_t start = k * kChunk;
    moment_chunk(x + start, mask + start, std::min(kChunk, n - start), nullptr, partial + 2 * k);
  }
  add_up<2>(partial, chunks, sums);
  const double count = sums[0], mean = sums[1] / std::max(count, 1.0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < chunks; ++k) {
    const std::int64_t start = k * kChunk;
    moment_chunk(x + start, mask + start, std::min(kChunk, n - start), &mean, partial + 2 * k);
  }
  add_up<2>(partial, chunks, sums);
  const double rstd = 1.0 / std::sqrt(sums[1] / std::max(count - 1.0, 1.0) + 1e-8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < chunks; ++k) {
    const std::int64_t start = k * kChunk;
    scale_chunk(x + start, mask + start, std::min(kChunk, n - start), mean, rstd,
                center ? 0.0 : mean, out + start);
  }
}

void value_rows(const ValueRows& rows, float* gradient, double* partial, double* sums,
                int threads) {
  const std::int64_t chunks = chunks_of(rows.n);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < chunks; ++k) {
    const std::int64_t start = k * kChunk;
    value_chunk(rows, start, std::min(start + kChunk, rows.n), gradient,
                partial + kValueSums * k);
  }
  add_up<kValueSums>(partial, chunks, sums);
}

}  // namespace fastrlhf
