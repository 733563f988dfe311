// Products of bfloat16 matrices with float32 accumulators, for CPUs that multiply bfloat16 pairs.
#pragma once

#include <cstdint>

namespace fastrlhf {

// out[rows, columns] <- left[rows, depth] times right[columns, depth] transposed; rows of `out` are
// `stride` apart, those of the operands are adjacent. depth is even.
struct Product {
  const std::uint16_t *left, *right;
  float* out;
  std::int64_t rows, columns, depth, stride;
  std::uint16_t* packed;  // room for `right` with its columns rounded up to kPanel
  int threads;
};

constexpr std::int64_t kPanel = 64;

bool has_bfloat16_products();
void bfloat16_product(const Product& product);

}  // namespace fastrlhf
