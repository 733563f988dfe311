// AdamW with block-wise 8-bit moments: each block is read, stepped and written back while it is in
// the first cache. Compiled without contraction into fma, so that it gives the same bits as the
// other backends (kernels/fastrlhf_kernels/_reference_adamw8bit.py).

#include "adamw8bit.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "clones.h"
#include "vector_math.h"

namespace fastrlhf {

namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

struct Block {
  alignas(64) float p[kStateBlock];
  alignas(64) float g[kStateBlock];
  alignas(64) float first[kStateBlock];
  alignas(64) float second[kStateBlock];
};

// A hash of the key and the element's index: "lowbias32" with half of the key before each round.
FASTRLHF_INLINE std::uint32_t random_bits(std::uint32_t index, const AdamWStep& step) {
  std::uint32_t x = index + step.key_low;
  x = (x ^ (x >> 16)) * 0x7feb352du + step.key_high;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The largest size as bits: integers keep the order of floats >= 0, and NaN is above infinity.
FASTRLHF_INLINE float largest_size(const float* x, std::int64_t n) {
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t j = 0; j < n; ++j) {
    const std::uint32_t size = as_bits(x[j]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return as_float(largest);
}

template <bool kSigned>
FASTRLHF_INLINE void quantize(const float* x, std::int64_t n, const Piece* pieces,
                              std::uint8_t* codes, float* scale) {
  const float absmax = largest_size(x, n);
  *scale = absmax;
  const float inverse = absmax >= kSmallestNormal ? 1.0f / absmax : 0.0f;
  Piece line[kPieces];
  for (int i = 0; i < kPieces; ++i) line[i] = pieces[i];
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const float scaled = as_float(as_bits(x[j]) & 0x7fffffffu) * inverse;
    const float size = scaled > 0.0f ? scaled : 0.0f;  // NaN as well
    float slope = line[0].slope, offset = line[0].offset, most = line[0].most;
    for (int i = 1; i < kPieces; ++i) {
      const bool above = size > line[i].above;
      slope = above ? line[i].slope : slope;
      offset = above ? line[i].offset : offset;
      most = above ? line[i].most : most;
    }
    float rank = size * slope + offset;
    rank = rank < most ? rank : most;
    rank = rank > 1.0f ? rank : 1.0f;
    const std::int32_t code = static_cast<std::int32_t>(size > line[0].above ? rank : 0.0f);
    if (kSigned) {
      const std::int32_t below = 127 - (code < 127 ? code : 127);
      codes[j] = static_cast<std::uint8_t>(x[j] < 0.0f ? below : 127 + code);
    } else {
      codes[j] = static_cast<std::uint8_t>(code);
    }
  }
}

FASTRLHF_CLONES
void update(Block& block, std::int64_t n, float first_scale, float second_scale,
            const AdamWStep& given) {
  const AdamWStep s = given;
  float *p = block.p, *g = block.g, *first = block.first, *second = block.second;
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const float m = first[j] * first_scale * s.beta1 + g[j] * s.one_minus_beta1;
    const float v = second[j] * second_scale * s.beta2 + g[j] * g[j] * s.one_minus_beta2;
    const float denominator = std::sqrt(v) * s.root_correction + s.eps;
    p[j] = p[j] * s.decay - m / denominator * s.step_size;
    first[j] = m;
    second[j] = v;
  }
}

FASTRLHF_CLONES
void quantize_both(const Block& block, std::int64_t n, const AdamWTensor& t, std::int64_t start) {
  const std::int64_t k = start / kStateBlock;
  quantize<true>(block.first, n, t.first.map.pieces, t.first.bytes() + start, t.first.scales + k);
  quantize<false>(block.second, n, t.second.map.pieces, t.second.bytes() + start,
                  t.second.scales + k);
}

FASTRLHF_CLONES
void write_stochastically(const float* x, std::int64_t n, std::uint16_t* half, std::int64_t start,
                          const AdamWStep& given) {
  const AdamWStep s = given;
  const std::uint32_t first_index = static_cast<std::uint32_t>(start);
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const std::uint32_t bits = random_bits(first_index + static_cast<std::uint32_t>(j), s);
    const std::uint32_t rounded = (as_bits(x[j]) + (bits & 0xffffu)) >> 16;
    half[j] = static_cast<std::uint16_t>(x[j] != x[j] ? 0x7fc0u : rounded);
  }
}

// Returns the scale that the numbers are still to be multiplied by.
float read_moment(const Moment& moment, std::int64_t start, std::int64_t n, float* x) {
  if (!moment.scales) {
    std::copy_n(moment.numbers() + start, n, x);
    return 1.0f;
  }
  const std::uint8_t* codes = moment.bytes() + start;
  const float* values = moment.map.values;
  std::int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int i = 0; i < 8; ++i) x[j + i] = values[codes[j + i]];
  }
  for (; j < n; ++j) x[j] = values[codes[j]];
  return moment.scales[start / kStateBlock];
}

void step_block(const AdamWTensor& t, std::int64_t start, const AdamWStep& step) {
  Block block;
  const std::int64_t n = std::min(kStateBlock, t.size - start);
  block_read(t.parameter, t.type, start, n, block.p);
  block_read(t.gradient, t.gradient_type, start, n, block.g);
  const float first_scale = read_moment(t.first, start, n, block.first);
  const float second_scale = read_moment(t.second, start, n, block.second);
  update(block, n, first_scale, second_scale, step);
  if (t.type == Type::kBFloat16 && step.stochastic) {
    write_stochastically(block.p, n, static_cast<std::uint16_t*>(t.parameter) + start, start, step);
  } else {
    block_write(block.p, n, t.parameter, t.type, start);
  }
  if (t.first.scales) {
    quantize_both(block, n, t, start);
  } else {
    std::copy_n(block.first, n, t.first.numbers() + start);
    std::copy_n(block.second, n, t.second.numbers() + start);
  }
}

}  // namespace

void adamw_step(const AdamWTensor& tensor, const AdamWStep& step, int threads) {
  const std::int64_t blocks = (tensor.size + kStateBlock - 1) / kStateBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t k = 0; k < blocks; ++k) step_block(tensor, k * kStateBlock, step);
}

}  // namespace fastrlhf
