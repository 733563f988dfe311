// Coefficients of log-probability, entropy and KL -> gradient of the logits (docs/math.md, section 2).

#include <algorithm>
#include <cstring>

#include "rows.h"

namespace fastrlhf {

namespace {

void one_row(float* z, const float* ref, std::int64_t columns, std::int64_t target,
             float on_target, const GradientRow& row) {
  const float slope = z[target] * row.cap_slope;
  const float target_gradient = on_target * row.scale * (1.0f - slope * slope);
  for (std::int64_t start = 0; start < columns; start += kBlock) {
    const std::int64_t n = std::min(kBlock, columns - start);
    block_gradient(z + start, ref ? ref + start : nullptr, n, row);
  }
  z[target] += target_gradient;
}

}  // namespace

void row_gradient(const Rows& rows, const TableRow* table, const float* coefficients) {
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    const float a = coefficients[3 * i], b = coefficients[3 * i + 1], c = coefficients[3 * i + 2];
    if (a == 0.0f && b == 0.0f && c == 0.0f) continue;
    const TableRow& t = table[i];
    const float temperature = rows.temperature[i];
    const float forward = rows.reverse ? 0.0f : c, reverse = rows.reverse ? c : 0.0f;
    const GradientRow row{
        t.max, t.log_sum, t.ref_max, t.ref_log_sum,
        -a - b * t.entropy - forward * t.kl, forward - b, -forward, reverse,
        rows.logit_scale / temperature, rows.softcap == 0.0f ? 0.0f : temperature / rows.softcap};
    // Without a KL coefficient the reference need not be read.
    const float* ref = rows.ref_logits && c != 0.0f ? rows.ref_logits + i * rows.stride : nullptr;
    one_row(rows.logits + i * rows.stride, ref, rows.columns, rows.targets[i], a, row);
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
