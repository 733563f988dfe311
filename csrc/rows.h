// Row kernels: plain C++ over pointers and sizes; the caller owns all memory.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace fastrlhf {

// One row of the table that the statistics write and the gradient reads.
struct TableRow {
  float max, log_sum, ref_max, ref_log_sum, logprob, entropy, kl, ref_logprob;
};

struct Rows {
  float* logits;
  float* ref_logits;  // or null
  std::int64_t rows, columns, stride;
  const std::int64_t* targets;
  const float* temperature;
  float logit_scale, softcap;
  bool reverse;
  int threads;
};

// A running maximum and the sums shifted by it.
struct RunningSum {
  float max;
  double sum = 0.0, moment = 0.0;
  RunningSum();
  // Shift to a larger maximum; returns the factor that sums shrink by.
  double raise(float larger);
  // What to subtract from logits: the maximum, or 0 while every column is masked.
  float base() const;
};

void row_statistics(const Rows& rows, const float* bias, const float* ref_bias, TableRow* table);
void row_gradient(const Rows& rows, const TableRow* table, const float* coefficients);
void compact_rows(float* logits, const std::int64_t* kept, std::int64_t count,
                  std::int64_t columns, std::int64_t stride, int threads);
void sample(const float* logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
            const float* temperature, const float* uniform, std::int64_t* tokens, float* logprobs,
            int threads);

}  // namespace fastrlhf
