#include "blocks.h"

#include <cstring>
#include <limits>

#include "clones.h"
#include "vector_math.h"

namespace fastrlhf {

namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
}

FASTRLHF_CLONES
void block_read(const void* row, Type type, std::int64_t start, std::int64_t n, float* z) {
  if (type == Type::kFloat32) {
    std::memcpy(z, static_cast<const float*>(row) + start,
                static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  const std::uint16_t* half = static_cast<const std::uint16_t*>(row) + start;
  if (type == Type::kBFloat16) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) z[j] = from_bfloat16(half[j]);
  } else {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) z[j] = from_float16(half[j]);
  }
}

FASTRLHF_CLONES
void block_write(const float* z, std::int64_t n, void* row, Type type, std::int64_t start) {
  if (type == Type::kFloat32) {
    std::memcpy(static_cast<float*>(row) + start, z, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  std::uint16_t* half = static_cast<std::uint16_t*>(row) + start;
  if (type == Type::kBFloat16) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) half[j] = to_bfloat16(z[j]);
  } else {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) half[j] = to_float16(z[j]);
  }
}

FASTRLHF_CLONES
void block_transform(float* z, std::int64_t n, std::int64_t offset, const Transform& transform) {
  const float scale = transform.logit_scale, cap = transform.softcap;
  const float temperature = transform.temperature;
  if (transform.bias) {
    const float* bias = transform.bias + offset;
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) z[j] += bias[j];
  }
  if (cap != 0.0f) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j)
      z[j] = cap * tanh_small(z[j] * scale / cap) / temperature;
  } else if (scale != 1.0f || temperature != 1.0f) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) z[j] = z[j] * scale / temperature;
  }
}

FASTRLHF_CLONES
BlockSums block_sums(const float* z, std::int64_t n, float base, float lowest) {
  float largest = -kInfinity, s = 0.0f, u = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : s, u)
  for (std::int64_t j = 0; j < n; ++j) {
    largest = z[j] > largest ? z[j] : largest;
    const float d = z[j] - base;
    const float bounded = lowest > d ? lowest : d;
    const float e = exp_term(bounded);
    s += e;
    u += e * bounded;
  }
  return {largest, s, u};
}

FASTRLHF_CLONES
void block_extras(const float* z, std::int64_t n, float base, float* total, float* squares) {
  float t = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : t, q)
  for (std::int64_t j = 0; j < n; ++j) {
    const float e = exp_small(z[j] - base);
    t += z[j];
    q += e * e;
  }
  *total = t;
  *squares = q;
}

FASTRLHF_CLONES
void block_exp(const float* z, std::int64_t n, float base, float* e) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) e[j] = exp_small(z[j] - base);
}

FASTRLHF_CLONES
double block_total(const float* e, std::int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < n; ++j) total += e[j];
  return total;
}

FASTRLHF_CLONES
float block_cross(const float* x, float x_base, const float* y, float y_base, std::int64_t n) {
  float g = 0.0f;
#pragma omp simd reduction(+ : g)
  for (std::int64_t j = 0; j < n; ++j) {
    const float e = exp_small(x[j] - x_base);
    const float term = e * ((x[j] - x_base) - (y[j] - y_base));
    g += e == 0.0f ? 0.0f : term;
  }
  return g;
}

FASTRLHF_CLONES
void block_gradient(float* z, const float* ref, std::int64_t n, const GradientRow& row) {
  const GradientRow r = row;
  // KL(ref||policy) allows a reference of -inf.
  const bool is_forward = r.on_ref_logprob != 0.0f;
  if (!ref) {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      const float logprob = (z[j] - r.max) - r.log_sum;
      const float p = exp_small(logprob);
      const float slope = z[j] * r.cap_slope;
      const float value = p * (r.constant + r.on_logprob * logprob) * r.scale;
      z[j] = p == 0.0f ? 0.0f : value * (1.0f - slope * slope);
    }
    return;
  }
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const float logprob = (z[j] - r.max) - r.log_sum;
    const float ref_logprob = (ref[j] - r.ref_max) - r.ref_log_sum;
    const float p = exp_small(logprob), ref_p = exp_small(ref_logprob);
    const float slope = z[j] * r.cap_slope;
    const float on_ref = is_forward ? r.on_ref_logprob * ref_logprob : 0.0f;
    const float own = p * (r.constant + r.on_logprob * logprob + on_ref);
    const float shown = (p == 0.0f ? 0.0f : own) + r.reverse * (p - ref_p);
    const float value = shown * r.scale * (1.0f - slope * slope);
    // A column that does not exist has no gradient, whatever the reference says of it.
    z[j] = z[j] < -3.0e38f ? 0.0f : value;
  }
}

}  // namespace fastrlhf
