// Rows of logits -> log-probability, entropy, KL (docs/math.md, section 1).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "reader.h"
#include "rows.h"

namespace fastrlhf {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// How far a block's maximum may lie above what is subtracted: sums stay below 1e32 in float32.
constexpr float kHeadroom = 60.0f;
// Columns of bfloat16 per block.
constexpr std::int64_t kWideBlock = 4 * kBlock;

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

// Add a block of two rows at once, with its part of the KL from `of` to `to`.
void add_pair(RunningSum& of, const float* x, RunningSum& to, const float* y, std::int64_t n,
              double& cross) {
  BlockSums of_sums = block_sums(x, n, of.base()), to_sums = block_sums(y, n, to.base());
  const bool of_raised = of_sums.max > of.max, to_raised = to_sums.max > to.max;
  if (of_raised || to_raised) raise_pair(of, of_sums.max, to, to_sums.max, cross);
  if (of_raised) of_sums = block_sums(x, n, of.base());
  if (to_raised) to_sums = block_sums(y, n, to.base());
  of.add(of_sums);
  to.add(to_sums);
  cross += block_cross(x, of.base(), y, to.base(), n);
}

// A tile's row in the workspace: what is read stays behind transformed.
struct OwnRow {
  float* z;
  Transform transform;
  std::int64_t first;  // column of z[0] in the vocabulary

  const float* block(std::int64_t start, std::int64_t n) {
    if (!transform.is_identity()) block_transform(z + start, n, first + start, transform);
    return z + start;
  }
};

void add_extras(RowState& state, const float* x, std::int64_t n, std::int64_t column,
                bool is_raised) {
  float total, squares;
  block_extras(x, n, state.policy.base(), &total, &squares);
  state.total += total;
  state.policy.squares += squares;
  if (is_raised) state.top = column + (std::find(x, x + n, state.policy.max) - x);
}

// Which columns of a row are at hand, and what is asked of them.
struct Columns {
  std::int64_t first, count, target;
  bool reverse, extras;
};

// Row: OwnRow or RowReader, of which block 0 is column `first`; `ref` may be null.
template <typename Row>
void add_columns(RowState& state, Row& z, Row* ref, const Columns& columns) {
  const std::int64_t target = columns.target - columns.first;
  for (std::int64_t start = 0; start < columns.count; start += kBlock) {
    const std::int64_t n = std::min(kBlock, columns.count - start);
    const bool has_target = start <= target && target < start + n;
    const float* x = z.block(start, n);
    if (has_target) state.target_logit = x[target - start];
    const float before = state.policy.max;
    if (ref) {
      const float* y = ref->block(start, n);
      if (has_target) state.ref_target_logit = y[target - start];
      if (columns.reverse) {
        add_pair(state.reference, y, state.policy, x, n, state.cross);
      } else {
        add_pair(state.policy, x, state.reference, y, n, state.cross);
      }
    } else {
      state.policy.add(x, n);
    }
    if (columns.extras)
      add_extras(state, x, n, columns.first + start, state.policy.max > before);
  }
}

TableRow finished(const RowState& state, bool has_reference, bool reverse) {
  const RunningSum &policy = state.policy, &reference = state.reference;
  const double log_sum = std::log(policy.sum);
  TableRow row{policy.max, static_cast<float>(log_sum), 0, 0, 0, 0, 0, 0};
  row.logprob = at_most((static_cast<double>(state.target_logit) - policy.max) - log_sum, 0.0);
  row.entropy = at_least(log_sum - policy.moment / policy.sum, 0.0);
  if (!has_reference) return row;
  const double ref_log_sum = std::log(reference.sum);
  const double gap = reverse ? state.cross / reference.sum - ref_log_sum + log_sum
                             : state.cross / policy.sum - log_sum + ref_log_sum;
  const double ref_target = state.ref_target_logit;
  row.ref_max = reference.max;
  row.ref_log_sum = static_cast<float>(ref_log_sum);
  row.kl = at_least(gap, 0.0);
  row.ref_logprob = at_most((ref_target - reference.max) - ref_log_sum, 0.0);
  return row;
}

ExtraRow finished_extras(const RowState& state, std::int64_t vocab, std::int64_t target) {
  const double log_squares = std::log(state.policy.squares) - 2.0 * std::log(state.policy.sum);
  return {static_cast<float>(state.total / static_cast<double>(vocab)),
          state.top == target ? 1.0f : 0.0f, at_most(log_squares, 0.0)};
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
  squares *= factor * factor;
  return factor;
}

void RunningSum::add(const BlockSums& block) {
  // Where every column is masked the sums hold the next-to-nothing of each; NaN stays NaN.
  const double weight = max == -kInfinity ? 0.0 : 1.0;
  sum += weight * block.sum;
  moment += weight * block.moment;
}

bool RunningSum::add(const float* z, std::int64_t n) {
  // The maximum rises in few blocks: it is cheaper to sum those twice than to look at all first.
  BlockSums block = block_sums(z, n, base());
  const bool is_raised = block.max > max;
  if (is_raised) {
    raise(block.max);
    block = block_sums(z, n, base());
  }
  add(block);
  return is_raised;
}

// The row as it lies: a word holds a pair with the first number below.
bool is_plain_bfloat16(const GivenRows& rows, std::int64_t i) {
  const std::uint32_t one = 1;
  unsigned char first;
  std::memcpy(&first, &one, 1);
  return first == 1 && rows.logits.type == Type::kBFloat16 && rows.temperature[i] == 1.0f;
}

void add_bfloat16(RowState& state, const std::uint16_t* row, const GivenRows& rows,
                  std::int64_t target) {
  for (std::int64_t start = 0; start < rows.columns; start += kWideBlock) {
    const std::int64_t n = std::min(kWideBlock, rows.columns - start);
    RunningSum& running = state.policy;
    const BlockSums block = block_sums_bfloat16(row + start, n, running.base());
    // A block that subtracted less than its maximum is right unless its sum came near overflow.
    const bool is_right = !(block.max - running.max > kHeadroom);
    if (is_right) running.add(block);
    running.raise(block.max);
    if (!is_right) running.add(block_sums_bfloat16(row + start, n, running.base()));
  }
  state.target_logit = RowReader(row, Type::kBFloat16, 1.0f).at(target);
}

void row_statistics(const Rows& rows, const float* bias, const float* ref_bias, RowState* states,
                    TableRow* table, ExtraRow* extras) {
  const bool has_reference = rows.ref_logits != nullptr;
  const bool is_first = rows.first == 0, is_last = rows.first + rows.columns == rows.vocab;
#pragma omp parallel for num_threads(rows.threads) schedule(static)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    RowState& state = states[i];
    if (is_first) state = RowState();
    const Transform transform{bias, rows.logit_scale, rows.softcap, rows.temperature[i]};
    const Transform ref_transform{ref_bias, rows.logit_scale, rows.softcap, rows.temperature[i]};
    OwnRow row{rows.logits + i * rows.stride, transform, rows.first};
    OwnRow ref{has_reference ? rows.ref_logits + i * rows.stride : nullptr, ref_transform,
               rows.first};
    add_columns(state, row, has_reference ? &ref : nullptr,
                {rows.first, rows.columns, rows.targets[i], rows.reverse, extras != nullptr});
    if (!is_last) continue;
    table[i] = finished(state, has_reference, rows.reverse);
    if (extras) extras[i] = finished_extras(state, rows.vocab, rows.targets[i]);
  }
}

void logit_statistics(const GivenRows& rows, const bool* used, TableRow* table) {
  const bool has_reference = rows.ref_logits.data != nullptr;
#pragma omp parallel for num_threads(rows.threads) schedule(dynamic)
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    if (!used[i]) continue;
    RowReader row(rows.logits.row(i), rows.logits.type, rows.temperature[i]);
    RowReader ref(has_reference ? rows.ref_logits.row(i) : nullptr, rows.ref_logits.type,
                  rows.temperature[i]);
    RowState state;
    if (!has_reference && is_plain_bfloat16(rows, i)) {
      add_bfloat16(state, static_cast<const std::uint16_t*>(rows.logits.row(i)), rows,
                   rows.targets[i]);
    } else {
      add_columns(state, row, has_reference ? &ref : nullptr,
                  {0, rows.columns, rows.targets[i], rows.reverse, false});
    }
    table[i] = finished(state, has_reference, rows.reverse);
  }
}

}  // namespace fastrlhf
