// Products of a few rows with a large matrix that lies as it is, as in a decoding step.
#pragma once

#include <cstdint>

namespace fastrlhf {

// out[rows, columns] <- left[rows, depth] times right[columns, depth] transposed, plus bias[columns]
// where it is not null, plus an adapter: scale times (left times down[rank, depth] transposed) times
// up[columns, rank] transposed; rank 0: none. All rows are adjacent; at most kMostRows of `left`.
struct FewRows {
  const float* left;
  const void* right;  // float32, or bfloat16 where `half` says so
  bool half;
  const float* bias;
  float* out;
  std::int64_t rows, columns, depth;
  const float *down, *up;
  std::int64_t rank;
  float scale;
  // Room for `left`, and for what `down` makes of it, with rows rounded up to kLanes; 64-byte aligned.
  float *packed, *low;
  int threads;
};

constexpr std::int64_t kLanes = 16, kMostRows = 64;

bool has_few_rows();
void few_rows_product(const FewRows& work);

}  // namespace fastrlhf
