// Coefficients of log-probability, entropy and KL -> gradient of the logits (docs/math.md, section 2).

#include <algorithm>
#include <cstring>

#include "reader.h"
#include "rows.h"
#include "vector_math.h"

namespace fastrlhf {

namespace {

bool is_zero(const float* coefficients) {
  return coefficients[0] == 0.0f && coefficients[1] == 0.0f && coefficients[2] == 0.0f;
}

// coefficients: dL/dlogprob, dL/dentropy, dL/dkl.
GradientRow gradient_row(const TableRow& t, const float* coefficients, bool is_reverse,
                         float scale, float cap_slope) {
  const float a = coefficients[0], b = coefficients[1], c = coefficients[2];
  const float forward = is_reverse ? 0.0f : c, reverse = is_reverse ? c : 0.0f;
  // A KL that the loss does not use may be infinite.
  const float on_kl = forward != 0.0f ? forward * t.kl : 0.0f;
  return {t.max, t.log_sum, t.ref_max, t.ref_log_sum,
          -a - b * t.entropy - on_kl, forward - b, -forward, reverse, scale, cap_slope};
}

// What the target's column has beyond the others. A call of its own: where it is added, a fused
// multiply-add must not make the ops differ in a bit.
FASTRLHF_NOINLINE float target_gradient(float z, float on_target, const GradientRow& row) {
  // Without a cap its slope is 1, also where the target's logit is -inf.
  const float slope = row.cap_slope == 0.0f ? 0.0f : z * row.cap_slope;
  return on_target * row.scale * (1.0f - slope * slope);
}

// target: the target's column in the tile, if it lies there.
void one_row(float* z, const float* ref, std::int64_t columns, std::int64_t target,
             float on_target, const GradientRow& row) {
  const bool has_target = 0 <= target && target < columns;
  const float extra = has_target ? target_gradient(z[target], on_target, row) : 0.0f;
  for (std::int64_t start = 0; start < columns; start += kBlock) {
    const std::int64_t n = std::min(kBlock, columns - start);
    block_gradient(z + start, ref ? ref + start : nullptr, n, row);
  }
  if (has_target) z[target] += extra;
}

}  // namespace

void row_gradient(const Rows& rows, const TableRow* table, const float* coefficients) {
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    const float* row_coefficients = coefficients + 3 * i;
    if (is_zero(row_coefficients)) continue;
    const float temperature = rows.temperature[i];
    const float cap_slope = rows.softcap == 0.0f ? 0.0f : temperature / rows.softcap;
    const GradientRow row = gradient_row(table[i], row_coefficients, rows.reverse,
                                         rows.logit_scale / temperature, cap_slope);
    // Without a KL coefficient the reference need not be read.
    const bool uses_reference = rows.ref_logits && row_coefficients[2] != 0.0f;
    const float* ref = uses_reference ? rows.ref_logits + i * rows.stride : nullptr;
    one_row(rows.logits + i * rows.stride, ref, rows.columns, rows.targets[i] - rows.first,
            row_coefficients[0], row);
  }
}

void logit_gradient(const GivenRows& rows, const TableRow* table, const float* coefficients,
                    const GradientRows& gradient) {
  const std::int64_t size = size_of(gradient.type);
#pragma omp parallel for num_threads(rows.threads) schedule(dynamic)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    const float* row_coefficients = coefficients + 3 * i;
    char* out = gradient.row(i);
    const bool skipped = is_zero(row_coefficients);
    // Zero has the same bits in every type.
    const std::int64_t written = skipped ? 0 : rows.columns;
    std::memset(out + written * size, 0,
                static_cast<std::size_t>((gradient.width - written) * size));
    if (skipped) continue;
    const float temperature = rows.temperature[i];
    const GradientRow row =
        gradient_row(table[i], row_coefficients, rows.reverse, 1.0f / temperature, 0.0f);
    const bool uses_reference = rows.ref_logits.data && row_coefficients[2] != 0.0f;
    RowReader z(rows.logits.row(i), rows.logits.type, temperature);
    RowReader ref(uses_reference ? rows.ref_logits.row(i) : nullptr, rows.ref_logits.type,
                  temperature);
    const std::int64_t target = rows.targets[i];
    for (std::int64_t start = 0; start < rows.columns; start += kBlock) {
      const std::int64_t n = std::min(kBlock, rows.columns - start);
      float* block = z.copy(start, n);
      block_gradient(block, uses_reference ? ref.block(start, n) : nullptr, n, row);
      if (target >= start && target < start + n)
        block[target - start] += target_gradient(0.0f, row_coefficients[0], row);
      block_write(block, n, out, gradient.type, start);
    }
  }
}

void compact_rows(float* logits, const std::int64_t* kept, std::int64_t count,
                  std::int64_t columns, std::int64_t stride, int threads) {
  // Rows move up in ascending order inside a strip of columns, so none is overwritten unread.
  const std::int64_t strips = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t strip = 0; strip < strips; ++strip) {
    const std::int64_t start = strip * kBlock, n = std::min(kBlock, columns - start);
    for (std::int64_t i = 0; i < count; ++i) {
      if (kept[i] == i) continue;
      std::memcpy(logits + i * stride + start, logits + kept[i] * stride + start,
                  static_cast<std::size_t>(n) * sizeof(float));
    }
  }
}

}  // namespace fastrlhf
