// Rows of logits -> log-probability, entropy, KL (docs/math.md, section 1).

#include <algorithm>
#include <cmath>
#include <limits>

#include "reader.h"
#include "rows.h"

namespace fastrlhf {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Comparisons that a NaN fails, so that it stays visible.
float at_most(double x, double bound) { return static_cast<float>(x > bound ? bound : x); }
float at_least(double x, double bound) { return static_cast<float>(x < bound ? bound : x); }

void raise_pair(RunningSum& of, float of_max, RunningSum& to, float to_max, double& cross) {
  const float of_base = of.base(), to_base = to.base();
  const double weight = of.sum;
  const double factor = of.raise(of_max);
  to.raise(to_max);
  if (weight == 0.0) return;
  const double shift = (static_cast<double>(of_base) - of.base()) -
                       (static_cast<double>(to_base) - to.base());
  cross = (cross + weight * shift) * factor;
}

void block_into(RunningSum& running, const float* z, std::int64_t n, float* e) {
  float sum, moment;
  block_sums(z, n, running.base(), e, &sum, &moment);
  running.sum += sum;
  running.moment += moment;
}

// A row of the workspace: what is read stays behind transformed.
struct OwnRow {
  float* z;
  Transform transform;

  const float* block(std::int64_t start, std::int64_t n) {
    if (!transform.is_identity()) block_transform(z + start, n, start, transform);
    return z + start;
  }
  float at(std::int64_t column) { return z[column]; }
};

// Row: OwnRow or RowReader; `ref` may be null.
template <typename Row>
TableRow one_row(Row& z, Row* ref, std::int64_t columns, std::int64_t target, bool reverse) {
  alignas(64) float e[kBlock], ref_e[kBlock];
  RunningSum policy, reference;
  double cross = 0.0;
  for (std::int64_t start = 0; start < columns; start += kBlock) {
    const std::int64_t n = std::min(kBlock, columns - start);
    const float* x = z.block(start, n);
    const float max = block_max(x, n);
    if (!ref) {
      policy.raise(max);
      block_into(policy, x, n, e);
      continue;
    }
    const float* y = ref->block(start, n);
    const float ref_max = block_max(y, n);
    if (reverse) {
      raise_pair(reference, ref_max, policy, max, cross);
    } else {
      raise_pair(policy, max, reference, ref_max, cross);
    }
    block_into(policy, x, n, e);
    block_into(reference, y, n, ref_e);
    cross += reverse ? block_cross(ref_e, y, reference.base(), x, policy.base(), n)
                     : block_cross(e, x, policy.base(), y, reference.base(), n);
  }
  const double log_sum = std::log(policy.sum);
  TableRow row{policy.max, static_cast<float>(log_sum), 0, 0, 0, 0, 0, 0};
  row.logprob = at_most((static_cast<double>(z.at(target)) - policy.max) - log_sum, 0.0);
  row.entropy = at_least(log_sum - policy.moment / policy.sum, 0.0);
  if (ref) {
    const double ref_log_sum = std::log(reference.sum);
    const double gap = reverse ? cross / reference.sum - ref_log_sum + log_sum
                               : cross / policy.sum - log_sum + ref_log_sum;
    row.ref_max = reference.max;
    row.ref_log_sum = static_cast<float>(ref_log_sum);
    row.kl = at_least(gap, 0.0);
    row.ref_logprob =
        at_most((static_cast<double>(ref->at(target)) - reference.max) - ref_log_sum, 0.0);
  }
  return row;
}

}  // namespace

RunningSum::RunningSum() : max(-kInfinity) {}

float RunningSum::base() const { return max == -kInfinity ? 0.0f : max; }

double RunningSum::raise(float larger) {
  if (!(larger > max)) return 1.0;
  const double shift = static_cast<double>(max) - larger;
  max = larger;
  // Nothing but zeros so far, unless a NaN came first.
  if (sum == 0.0 || std::isinf(shift)) return 1.0;
  const double factor = std::exp(shift);
  moment = (moment + sum * shift) * factor;
  sum *= factor;
  return factor;
}

void row_statistics(const Rows& rows, const float* bias, const float* ref_bias, TableRow* table) {
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    const float temperature = rows.temperature[i];
    float* ref_logits = rows.ref_logits ? rows.ref_logits + i * rows.stride : nullptr;
    OwnRow row{rows.logits + i * rows.stride, {bias, rows.logit_scale, rows.softcap, temperature}};
    OwnRow ref{ref_logits, {ref_bias, rows.logit_scale, rows.softcap, temperature}};
    table[i] = one_row(row, ref_logits ? &ref : nullptr, rows.columns, rows.targets[i],
                       rows.reverse);
  }
}

void logit_statistics(const GivenRows& rows, const bool* used, TableRow* table) {
  const bool has_reference = rows.ref_logits.data != nullptr;
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    if (!used[i]) continue;
    RowReader row(rows.logits.row(i), rows.logits.type, rows.temperature[i]);
    RowReader ref(has_reference ? rows.ref_logits.row(i) : nullptr, rows.ref_logits.type,
                  rows.temperature[i]);
    table[i] = one_row(row, has_reference ? &ref : nullptr, rows.columns, rows.targets[i],
                       rows.reverse);
  }
}

}  // namespace fastrlhf
