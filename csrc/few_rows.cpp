// A lane is a row of `left`, so a number of `right` is loaded once, for all rows, and no sum runs
// across lanes. `right` is read once, in its own order, and never copied.
#include "few_rows.h"

#include <algorithm>
#include <cstring>

#if defined(FASTRLHF_AVX512_BF16)

#include <immintrin.h>

#define FASTRLHF_AVX512 __attribute__((target("avx512f")))

namespace fastrlhf {

namespace {

// Terms that are summed before they join the total: shorter sums round less.
constexpr std::int64_t kDepth = 128;
constexpr std::int64_t kLine = 16;  // floats in a cache line

// left[rows, depth] -> packed[depth][vectors * 16]; missing rows are 0
void pack(const FewRows& work, std::int64_t width, std::int64_t first, std::int64_t last) {
  for (std::int64_t k = first; k < last; k += kLine)
    for (std::int64_t row = 0; row < width; ++row)
      for (std::int64_t i = k; i < std::min(k + kLine, last); ++i)
        work.packed[i * width + row] = row < work.rows ? work.left[row * work.depth + i] : 0.0f;
}

inline void raise(const float* from, std::int64_t count, float* to) {
  std::copy(from, from + count, to);
}

// A bfloat16 is the upper half of a float32.
inline void raise(const std::uint16_t* from, std::int64_t count, float* to) {
  std::uint32_t bits[kDepth];
  for (std::int64_t i = 0; i < count; ++i) bits[i] = static_cast<std::uint32_t>(from[i]) << 16;
  std::memcpy(to, bits, count * sizeof(float));
}

// total[j][row] += packed[k][row] * right[first + j][k], over all k < depth
template <int kVectors, int kColumns, typename Number>
FASTRLHF_AVX512 void add_products(const float* packed, const Number* right, std::int64_t depth,
                                  std::int64_t first, std::int64_t count,
                                  float (&total)[kColumns][kVectors * 16]) {
  constexpr int kWidth = kVectors * 16;
  const Number* rows[kColumns];
  for (int j = 0; j < kColumns; ++j)
    rows[j] = right + (first + std::min<std::int64_t>(j, count - 1)) * depth;
  // Rows that are a multiple of 2 KiB apart would push each other out of the cache.
  alignas(64) float panel[kColumns][kDepth + kLine];
  for (std::int64_t start = 0; start < depth; start += kDepth) {
    const std::int64_t stop = std::min(depth, start + kDepth);
    for (int j = 0; j < kColumns; ++j) raise(rows[j] + start, stop - start, panel[j]);
    // What is read next: the same rows further on, or the next tile. Past the end it does nothing.
    const std::int64_t next = stop < depth ? stop : kColumns * depth;
    __m512 sum[kColumns][kVectors];
#pragma GCC unroll 32
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[j][v] = _mm512_setzero_ps();
    for (std::int64_t line = start; line < stop; line += kLine) {
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j)
        __builtin_prefetch(rows[j] + next + (line - start), 0, 2);
      const std::int64_t end = std::min(stop, line + kLine);
      for (std::int64_t k = line; k < end; ++k) {
        __m512 left[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) left[v] = _mm512_load_ps(packed + k * kWidth + v * 16);
#pragma GCC unroll 32
        for (int j = 0; j < kColumns; ++j) {
          const __m512 right = _mm512_set1_ps(panel[j][k - start]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[j][v] = _mm512_fmadd_ps(left[v], right, sum[j][v]);
        }
      }
    }
#pragma GCC unroll 32
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = total[j] + v * 16;
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum[j][v]));
      }
  }
}

// What the adapter's first half makes of `left`, scaled: it lies as the packed rows do.
template <int kVectors, int kColumns>
void low_tile(const FewRows& work, std::int64_t first) {
  constexpr int kWidth = kVectors * 16;
  const std::int64_t count = std::min<std::int64_t>(kColumns, work.rank - first);
  alignas(64) float total[kColumns][kWidth] = {};
  add_products<kVectors>(work.packed, work.down, work.depth, first, count, total);
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t row = 0; row < kWidth; ++row)
      work.low[(first + j) * kWidth + row] = work.scale * total[j][row];
}

template <int kVectors, int kColumns>
void tile(const FewRows& work, std::int64_t first) {
  const std::int64_t count = std::min<std::int64_t>(kColumns, work.columns - first);
  alignas(64) float total[kColumns][kVectors * 16] = {};
  if (work.half)
    add_products<kVectors>(work.packed, static_cast<const std::uint16_t*>(work.right), work.depth,
                           first, count, total);
  else
    add_products<kVectors>(work.packed, static_cast<const float*>(work.right), work.depth, first,
                           count, total);
  if (work.rank) add_products<kVectors>(work.low, work.up, work.rank, first, count, total);
  for (std::int64_t row = 0; row < work.rows; ++row) {
    float* out = work.out + row * work.columns + first;
    for (std::int64_t j = 0; j < count; ++j)
      out[j] = total[j][row] + (work.bias ? work.bias[first + j] : 0.0f);
  }
}

template <int kVectors, int kColumns>
void product(const FewRows& work) {
  const std::int64_t tiles = (work.columns + kColumns - 1) / kColumns;
  const std::int64_t low_tiles = (work.rank + kColumns - 1) / kColumns;
  const std::int64_t lines = (work.depth + kLine - 1) / kLine;
#pragma omp parallel num_threads(work.threads)
  {
#pragma omp for schedule(static)
    for (std::int64_t line = 0; line < lines; ++line)
      pack(work, kVectors * 16, line * kLine, std::min(work.depth, (line + 1) * kLine));
    if (low_tiles) {
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < low_tiles; ++i) low_tile<kVectors, kColumns>(work, i * kColumns);
    }
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < tiles; ++i) tile<kVectors, kColumns>(work, i * kColumns);
  }
}

}  // namespace

bool has_few_rows() { return __builtin_cpu_supports("avx512f"); }

// 24 accumulators, and room for the operands.
void few_rows_product(const FewRows& work) {
  switch ((work.rows + kLanes - 1) / kLanes) {
    case 1: return product<1, 24>(work);
    case 2: return product<2, 12>(work);
    case 3: return product<3, 8>(work);
    default: return product<4, 6>(work);
  }
}

}  // namespace fastrlhf

#else

namespace fastrlhf {

bool has_few_rows() { return false; }
void few_rows_product(const FewRows&) {}

}  // namespace fastrlhf

#endif
