// Row kernels: plain C++ over pointers and sizes; the caller owns all memory.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace fastrlhf {

// One row of the table that the statistics write and the gradient reads.
struct TableRow {
  float max, log_sum, ref_max, ref_log_sum, logprob, entropy, kl, ref_logprob;
};

// A tile of a workspace: columns first ... first + columns of rows that have `vocab` of them.
struct Rows {
  float* logits;
  float* ref_logits;  // or null
  std::int64_t rows, columns, stride, first, vocab;
  const std::int64_t* targets;
  const float* temperature;
  float logit_scale, softcap;
  bool reverse;
  int threads;
};

// Rows of a tensor that the caller owns: row i starts offsets[i] numbers after `data`, so that any
// layout with adjacent columns can be read where it lies.
struct LogitRows {
  const void* data;  // or null
  Type type;
  const std::int64_t* offsets;

  const void* row(std::int64_t i) const {
    return static_cast<const char*>(data) + offsets[i] * size_of(type);
  }
};

struct GivenRows {
  LogitRows logits, ref_logits;
  std::int64_t rows, columns;
  const std::int64_t* targets;
  const float* temperature;
  bool reverse;
  int threads;
};

// Where the gradient of GivenRows goes: rows of `width` columns, of which the first are theirs. It
// may be the logits themselves.
struct GradientRows {
  void* data;
  Type type;
  const std::int64_t* offsets;
  std::int64_t width;

  char* row(std::int64_t i) const {
    return static_cast<char*>(data) + offsets[i] * size_of(type);
  }
};

// A running maximum and the sums shifted by it.
struct RunningSum {
  float max;
  double sum = 0.0, moment = 0.0, squares = 0.0;
  RunningSum();
  // Shift to a larger maximum; returns the factor that sums shrink by.
  double raise(float larger);
  // What to subtract from logits: the maximum, or 0 while every column is masked.
  float base() const;
  // The sums of a block whose maximum is not above this one's.
  void add(const BlockSums& block);
  // Add a block of logits; whether it raised the maximum.
  bool add(const float* z, std::int64_t n);
};

// What is known of a row after some of its columns, from the first on.
struct RowState {
  RunningSum policy, reference;
  double cross = 0.0, total = 0.0;
  std::int64_t top = 0;                      // the first column of the largest logit
  float target_logit = 0, ref_target_logit = 0;
};

struct ExtraRow {
  float mean_logits, is_top1, log_sum_sq_probs;
};

// Add a tile to the states; the first tile starts them, the last one writes the table, and the
// extras where they are wanted. The tempered logits stay behind in the tile.
void row_statistics(const Rows& rows, const float* bias, const float* ref_bias, RowState* states,
                    TableRow* table, ExtraRow* extras);
void row_gradient(const Rows& rows, const TableRow* table, const float* coefficients);
// Rows that are not used are neither read nor given a line of the table.
void logit_statistics(const GivenRows& rows, const bool* used, TableRow* table);
// Rows whose coefficients are all 0 are not read, and get zeros.
void logit_gradient(const GivenRows& rows, const TableRow* table, const float* coefficients,
                    const GradientRows& gradient);
void compact_rows(float* logits, const std::int64_t* kept, std::int64_t count,
                  std::int64_t columns, std::int64_t stride, int threads);
// Which tokens may be drawn: the top_k largest (0: all), of those the fewest with a mass of top_p.
struct Narrowing {
  std::int64_t top_k;
  double top_p;
};

// A token is -1 where a row has no finite sum.
void sample(const LogitRows& logits, std::int64_t rows, std::int64_t columns,
            const float* temperature, const float* uniform, const Narrowing& narrowing,
            std::int64_t* tokens, float* logprobs, int threads);

}  // namespace fastrlhf
