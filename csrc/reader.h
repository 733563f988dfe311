// Reads a row that belongs to the caller, block by block; nothing is written back to it.
#pragma once

#include <algorithm>

#include "blocks.h"

namespace fastrlhf {

class RowReader {
 public:
  RowReader(const void* row, Type type, float temperature)
      : row_(row), type_(type), transform_{nullptr, 1.0f, 0.0f, temperature} {}

  // Tempered columns from `start` on, in float32, that the caller may change.
  float* copy(std::int64_t start, std::int64_t n) {
    // Between two copies there is only arithmetic: without it memory would wait, and then the copy.
    block_prefetch(row_, type_, start + 2 * kBlock, n);
    block_read(row_, type_, start, n, z_);
    if (!transform_.is_identity()) block_transform(z_, n, start, transform_);
    return z_;
  }

  // The same to be read only: the row itself where it holds these very numbers.
  const float* block(std::int64_t start, std::int64_t n) {
    const bool as_it_is = type_ == Type::kFloat32 && transform_.is_identity();
    return as_it_is ? static_cast<const float*>(row_) + start : copy(start, n);
  }

  float at(std::int64_t column) { return *copy(column, 1); }

 private:
  const void* row_;
  Type type_;
  Transform transform_;
  alignas(64) float z_[kBlock];
};

}  // namespace fastrlhf
