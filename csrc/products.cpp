#include "products.h"

#include <algorithm>

#if defined(FASTRLHF_AVX512_BF16)

#include <immintrin.h>

#define FASTRLHF_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

namespace fastrlhf {

namespace {

constexpr int kVector = 16, kVectors = kPanel / kVector;
constexpr int kRows = 6;  // times four vectors: 24 accumulators, and room for the operands
// Pairs that are summed before they join the total: shorter sums round less.
constexpr std::int64_t kDepth = 128;

// Panel of up to 64 columns -> for each pair of the depth 64 times 32 bits; missing columns are 0.
FASTRLHF_BF16 void pack(const Product& product, std::int64_t first, std::uint16_t* packed) {
  const std::int64_t pairs = product.depth / 2;
  const std::int64_t columns = std::min(kPanel, product.columns - first);
  const int* source = reinterpret_cast<const int*>(product.right + first * product.depth);
  int* panel = reinterpret_cast<int*>(packed);
  const __m512i lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(pairs)));
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t here = std::clamp<std::int64_t>(columns - v * kVector, 0, kVector);
    const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1u);
    for (std::int64_t k = 0; k < pairs; ++k) {
      const __m512i column = _mm512_mask_i32gather_epi32(
          _mm512_setzero_si512(), mask, offsets, source + v * kVector * pairs + k, 4);
      _mm512_storeu_si512(panel + k * kPanel + v * kVector, column);
    }
  }
}

template <int kCount>
FASTRLHF_BF16 void rows_times_panel(const Product& product, std::int64_t row, std::int64_t first,
                                    const std::uint16_t* packed) {
  const std::int64_t pairs = product.depth / 2;
  const std::int64_t columns = std::min(kPanel, product.columns - first);
  const int* left = reinterpret_cast<const int*>(product.left + row * product.depth);
  const float* panel = reinterpret_cast<const float*>(packed);
  float* out = product.out + row * product.stride + first;
  for (std::int64_t start = 0; start < pairs; start += kDepth) {
    const std::int64_t stop = std::min(pairs, start + kDepth);
    __m512 sum[kCount][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
    for (std::int64_t k = start; k < stop; ++k) {
      __m512bh right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        right[v] = (__m512bh)_mm512_loadu_ps(panel + k * kPanel + v * kVector);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(left[i * pairs + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[i][v] = _mm512_dpbf16_ps(sum[i][v], pair, right[v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t here = std::clamp<std::int64_t>(columns - v * kVector, 0, kVector);
        const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1u);
        float* to = out + i * product.stride + v * kVector;
        const __m512 total = start ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(total, sum[i][v]));
      }
  }
}

void panel(const Product& product, std::int64_t first) {
  std::uint16_t* packed = product.packed + first * product.depth;
  pack(product, first, packed);
  std::int64_t row = 0;
  for (; row + kRows <= product.rows; row += kRows)
    rows_times_panel<kRows>(product, row, first, packed);
  switch (product.rows - row) {
    case 5: return rows_times_panel<5>(product, row, first, packed);
    case 4: return rows_times_panel<4>(product, row, first, packed);
    case 3: return rows_times_panel<3>(product, row, first, packed);
    case 2: return rows_times_panel<2>(product, row, first, packed);
    case 1: return rows_times_panel<1>(product, row, first, packed);
    default: return;
  }
}

}  // namespace

bool has_bfloat16_products() { return __builtin_cpu_supports("avx512bf16"); }

void bfloat16_product(const Product& product) {
#pragma omp parallel for num_threads(product.threads) schedule(static)
  for (std::int64_t first = 0; first < product.columns; first += kPanel) panel(product, first);
}

}  // namespace fastrlhf

#else

namespace fastrlhf {

bool has_bfloat16_products() { return false; }
void bfloat16_product(const Product&) {}

}  // namespace fastrlhf

#endif
