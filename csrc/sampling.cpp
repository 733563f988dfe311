// One token per row by the inverse of the cumulative distribution.

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace fastrlhf {

namespace {

// Reads a row block by block through its temperature; nothing is written back to the logits.
struct Reader {
  const float* logits;
  std::int64_t columns;
  Transform transform;
  alignas(64) float z[kBlock];
  alignas(64) float e[kBlock];

  std::int64_t load(std::int64_t start) {
    const std::int64_t n = std::min(kBlock, columns - start);
    std::copy_n(logits + start, n, z);
    if (!transform.is_identity()) block_transform(z, n, start, transform);
    return n;
  }
};

std::int64_t pick(Reader& reader, const RunningSum& total, double uniform) {
  const double wanted = uniform * total.sum;
  double below = 0.0;
  std::int64_t last_possible = -1;
  for (std::int64_t start = 0; start < reader.columns; start += kBlock) {
    const std::int64_t n = reader.load(start);
    const float sum = block_sums(reader.z, n, total.base()).sum;
    block_exp(reader.z, n, total.base(), reader.e);
    const bool here = below + sum > wanted;
    double cumulative = below;
    if (here || start + n >= reader.columns || sum > 0.0f) {
      for (std::int64_t j = 0; j < n; ++j) {
        if (reader.e[j] == 0.0f) continue;
        last_possible = start + j;
        if (!here) continue;
        cumulative += reader.e[j];
        if (cumulative > wanted) return last_possible;
      }
    }
    // The block's sum was rounded above its own terms: its last possible token is meant.
    if (here) return last_possible;
    below += sum;
  }
  return last_possible;
}

}  // namespace

void sample(const float* logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
            const float* temperature, const float* uniform, std::int64_t* tokens, float* logprobs,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < rows; ++i) {
    Reader reader;
    reader.logits = logits + i * stride;
    reader.columns = columns;
    reader.transform = Transform{nullptr, 1.0f, 0.0f, temperature[i]};
    RunningSum total;
    for (std::int64_t start = 0; start < columns; start += kBlock) {
      const std::int64_t n = reader.load(start);
      total.add(reader.z, n);
    }
    tokens[i] = -1;
    logprobs[i] = 0.0f;
    if (!(total.sum > 0.0) || !std::isfinite(total.sum)) continue;
    const std::int64_t token = pick(reader, total, uniform[i]);
    tokens[i] = token;
    const double z = static_cast<double>(reader.logits[token] / temperature[i]);
    logprobs[i] = static_cast<float>(std::min(0.0, (z - total.max) - std::log(total.sum)));
  }
}

}  // namespace fastrlhf
