// One token per row by the inverse of the cumulative distribution, of all tokens or of the most
// likely ones. What is kept is found by radix selection: histograms over the bits of the logits,
// no sort and no memory that grows with the vocabulary.

#include <algorithm>
#include <cmath>

#include "reader.h"
#include "rows.h"
#include "vector_math.h"

namespace fastrlhf {

namespace {

// Bits that order like the numbers they are of; 0 and -0 have the same.
std::uint32_t key_of(float z) {
  const std::uint32_t bits = as_bits(z + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Tokens that are kept: those with larger keys, and the first `ties` with this one.
struct Cut {
  std::uint32_t key = 0;
  std::int64_t ties = 0;
  double mass = 0.0;  // sum of exp(z - base) over the kept
};

// The logits as they are, which order the tokens exactly, and the terms of their tempered softmax.
struct Row {
  RowReader raw, tempered;
  std::int64_t columns;
  float base;
  alignas(64) float e[kBlock];

  const float* terms(std::int64_t start, std::int64_t n) {
    block_exp(tempered.block(start, n), n, base, e);
    return e;
  }
};

constexpr int kShifts[] = {21, 10, 0};
constexpr std::uint32_t kBins = 2048;

// Where a descent from the largest key has come to.
struct Descent {
  std::uint32_t prefix = 0, mask = 0;
  std::int64_t count = 0;  // of tokens with larger keys
  double mass = 0.0;
};

struct Histogram {
  std::int64_t count[kBins];
  double mass[kBins];

  void fill(Row& row, const Descent& descent, int shift, std::uint32_t lowest) {
    std::fill(count, count + kBins, 0);
    std::fill(mass, mass + kBins, 0.0);
    for (std::int64_t start = 0; start < row.columns; start += kBlock) {
      const std::int64_t n = std::min(kBlock, row.columns - start);
      const float* z = row.raw.block(start, n);
      const float* e = row.terms(start, n);
      for (std::int64_t j = 0; j < n; ++j) {
        const std::uint32_t key = key_of(z[j]);
        if (key < lowest || (key & descent.mask) != descent.prefix) continue;
        const std::uint32_t bin = (key >> shift) & (kBins - 1);
        count[bin] += 1;
        mass[bin] += e[j];
      }
    }
  }

  // Go down to the bin in which `tokens` or `share` of the mass is reached, or to the last one.
  std::uint32_t descend(Descent& descent, std::int64_t tokens, double share) const {
    std::uint32_t bin = kBins, last = kBins;
    while (bin-- > 0) {
      if (!count[bin]) continue;
      if (last < kBins) {
        descent.count += count[last];
        descent.mass += mass[last];
      }
      last = bin;
      if (descent.count + count[bin] >= tokens || descent.mass + mass[bin] >= share) break;
    }
    return last;
  }
};

// Keep the `tokens` largest and their equals, or the fewest with at least top_p of the mass. Of
// equals at the edge of top_p those that come first are kept.
Cut find_cut(Row& row, const Cut& within, std::int64_t tokens, double top_p) {
  Histogram histogram;
  Descent descent;
  double share = INFINITY;
  std::uint32_t bin = 0;
  for (const int shift : kShifts) {
    histogram.fill(row, descent, shift, within.key);
    if (top_p < 1.0 && descent.mask == 0) {
      double total = 0.0;
      for (const double mass : histogram.mass) total += mass;
      share = top_p * total;
    }
    bin = histogram.descend(descent, tokens, share);
    descent.prefix |= bin << shift;
    descent.mask |= (shift ? kBins - 1 : 1023u) << shift;
  }
  std::int64_t ties = histogram.count[bin];
  const double each = histogram.mass[bin] / static_cast<double>(ties);
  if (top_p < 1.0 && each > 0.0) {
    const double wanted = std::ceil((share - descent.mass) / each);
    if (wanted < static_cast<double>(ties))
      ties = std::max<std::int64_t>(1, static_cast<std::int64_t>(wanted));
  }
  return {descent.prefix, ties, descent.mass + each * static_cast<double>(ties)};
}

// e <- 0 where a token is not kept.
void drop(float* e, const float* z, std::int64_t n, Cut& cut) {
  for (std::int64_t j = 0; j < n; ++j) {
    const std::uint32_t key = key_of(z[j]);
    if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) e[j] = 0.0f;
  }
}

// The token at which the cumulated terms pass `wanted`; -1 if there is none.
std::int64_t pick(Row& row, double wanted, const Cut* kept) {
  Cut cut = kept ? *kept : Cut();
  double below = 0.0;
  std::int64_t last = -1;
  for (std::int64_t start = 0; start < row.columns; start += kBlock) {
    const std::int64_t n = std::min(kBlock, row.columns - start);
    row.terms(start, n);
    if (kept) drop(row.e, row.raw.block(start, n), n, cut);
    const double sum = block_total(row.e, n);
    if (!(sum > 0.0)) continue;
    if (!(below + sum > wanted)) {
      below += sum;
      last = start + n - 1;
      while (row.e[last - start] == 0.0f) --last;
      continue;
    }
    double cumulative = below;
    for (std::int64_t j = 0; j < n; ++j) {
      if (row.e[j] == 0.0f) continue;
      last = start + j;
      cumulative += row.e[j];
      if (cumulative > wanted) break;
    }
    return last;
  }
  // Rounding has carried `wanted` past the last token: the last possible one is meant.
  return last;
}

}  // namespace

void sample(const LogitRows& logits, std::int64_t rows, std::int64_t columns,
            const float* temperature, const float* uniform, const Narrowing& narrowing,
            std::int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t i = 0; i < rows; ++i) {
    Row row{RowReader(logits.row(i), logits.type, 1.0f),
            RowReader(logits.row(i), logits.type, temperature[i]), columns, 0.0f, {}};
    RunningSum total;
    for (std::int64_t start = 0; start < columns; start += kBlock) {
      const std::int64_t n = std::min(kBlock, columns - start);
      total.add(row.tempered.block(start, n), n);
    }
    tokens[i] = -1;
    logprobs[i] = 0.0f;
    if (!(total.sum > 0.0) || !std::isfinite(total.sum)) continue;
    row.base = total.base();
    Cut cut;
    const bool has_top_k = 0 < narrowing.top_k && narrowing.top_k < columns;
    const bool is_narrowed = has_top_k || narrowing.top_p < 1.0;
    if (has_top_k) cut = find_cut(row, cut, narrowing.top_k, 1.0);
    if (narrowing.top_p < 1.0) cut = find_cut(row, cut, columns + 1, narrowing.top_p);
    const double mass = is_narrowed ? cut.mass : total.sum;
    const std::int64_t token = pick(row, uniform[i] * mass, is_narrowed ? &cut : nullptr);
    tokens[i] = token;
    if (token < 0) continue;
    const double z = row.tempered.at(token);
    logprobs[i] = static_cast<float>(std::min(0.0, (z - total.max) - std::log(total.sum)));
  }
}

}  // namespace fastrlhf
