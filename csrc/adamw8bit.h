// One step of AdamW over one tensor, in place.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace fastrlhf {

// Numbers that share one scale.
constexpr std::int64_t kStateBlock = 256;
constexpr int kPieces = 8;

// Sizes above `above` have rank floor(min(size * slope + offset, most)) among the codes >= 0.
struct Piece {
  float above, slope, offset, most;
};

// What the 256 codes of a moment stand for, and the nearest code in closed form.
struct StateMap {
  const float* values;
  const Piece* pieces;
};

struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, root_correction;
  std::uint32_t key_low, key_high;  // of the random bits
  bool stochastic;                  // how bfloat16 parameters are rounded
};

// Without scales the codes are float32 moments.
struct Moment {
  void* codes;
  float* scales;  // or null
  StateMap map;

  std::uint8_t* bytes() const { return static_cast<std::uint8_t*>(codes); }
  float* numbers() const { return static_cast<float*>(codes); }
};

struct AdamWTensor {
  void* parameter;
  Type type;
  const void* gradient;
  Type gradient_type;
  std::int64_t size;
  Moment first, second;
};

void adamw_step(const AdamWTensor& tensor, const AdamWStep& step, int threads);

}  // namespace fastrlhf
