// Products of a few rows with a large float32 matrix that lies as it is, as in a decoding step.
#pragma once

#include <cstdint>

namespace fastrlhf {

// out[rows, columns] <- left[rows, depth] times right[columns, depth] transposed, plus bias[columns]
// where it is not null. All rows are adjacent; at most kMostRows of them.
struct FewRows {
  const float *left, *right, *bias;
  float* out;
  std::int64_t rows, columns, depth;
  float* packed;  // room for `left` with its rows rounded up to kLanes, 64-byte aligned
  int threads;
};

constexpr std::int64_t kLanes = 16, kMostRows = 64;

bool has_few_rows();
void few_rows_product(const FewRows& work);

}  // namespace fastrlhf
