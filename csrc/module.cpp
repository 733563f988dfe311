// The Python border: pointers arrive as integers, and the GIL is released for all of the work.

#include <nanobind/nanobind.h>

#include <cstdint>

#include "adamw8bit.h"
#include "few_rows.h"
#include "products.h"
#include "rows.h"
#include "tokens.h"

namespace nb = nanobind;
using fastrlhf::ExtraRow;
using fastrlhf::GivenRows;
using fastrlhf::LogitRows;
using fastrlhf::Rows;
using fastrlhf::RowState;
using fastrlhf::TableRow;
using fastrlhf::Type;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void row_statistics(Address logits, Address ref_logits, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, std::int64_t first, std::int64_t vocab, Address targets,
                    Address temperature, Address table, Address bias, Address ref_bias,
                    Address states, Address extras, float logit_scale, float softcap, bool reverse,
                    int threads) {
  const Rows work{at<float>(logits), at<float>(ref_logits), rows, columns, stride, first, vocab,
                  at<const std::int64_t>(targets), at<const float>(temperature), logit_scale,
                  softcap, reverse, threads};
  fastrlhf::row_statistics(work, at<const float>(bias), at<const float>(ref_bias),
                           at<RowState>(states), at<TableRow>(table), at<ExtraRow>(extras));
}

void row_gradient(Address logits, Address ref_logits, std::int64_t rows, std::int64_t columns,
                  std::int64_t stride, std::int64_t first, std::int64_t vocab, Address targets,
                  Address temperature, Address table, Address coefficients, float logit_scale,
                  float softcap, bool reverse, int threads) {
  const Rows work{at<float>(logits), at<float>(ref_logits), rows, columns, stride, first, vocab,
                  at<const std::int64_t>(targets), at<const float>(temperature), logit_scale,
                  softcap, reverse, threads};
  fastrlhf::row_gradient(work, at<const TableRow>(table), at<const float>(coefficients));
}

LogitRows logit_rows(Address data, int type, Address offsets) {
  return {at<const void>(data), static_cast<Type>(type), at<const std::int64_t>(offsets)};
}

void logit_statistics(Address logits, int type, Address offsets, Address ref_logits, int ref_type,
                      Address ref_offsets, std::int64_t rows, std::int64_t columns,
                      Address targets, Address used, Address temperature, Address table,
                      bool reverse, int threads) {
  const GivenRows work{logit_rows(logits, type, offsets),
                       logit_rows(ref_logits, ref_type, ref_offsets), rows, columns,
                       at<const std::int64_t>(targets), at<const float>(temperature), reverse,
                       threads};
  fastrlhf::logit_statistics(work, at<const bool>(used), at<TableRow>(table));
}

void logit_gradient(Address logits, int type, Address offsets, Address ref_logits, int ref_type,
                    Address ref_offsets, std::int64_t rows, std::int64_t columns, Address targets,
                    Address temperature, Address table, Address coefficients, Address gradient,
                    Address gradient_offsets, std::int64_t width, bool reverse, int threads) {
  const GivenRows work{logit_rows(logits, type, offsets),
                       logit_rows(ref_logits, ref_type, ref_offsets), rows, columns,
                       at<const std::int64_t>(targets), at<const float>(temperature), reverse,
                       threads};
  fastrlhf::logit_gradient(work, at<const TableRow>(table), at<const float>(coefficients),
                           {at<void>(gradient), static_cast<Type>(type),
                            at<const std::int64_t>(gradient_offsets), width});
}

void compact_rows(Address logits, Address kept, std::int64_t count, std::int64_t columns,
                  std::int64_t stride, int threads) {
  fastrlhf::compact_rows(at<float>(logits), at<const std::int64_t>(kept), count, columns, stride,
                         threads);
}

void sample(Address logits, int type, Address offsets, std::int64_t rows, std::int64_t columns,
            Address temperature, Address uniform, std::int64_t top_k, double top_p, Address tokens,
            Address logprobs, int threads) {
  fastrlhf::sample(logit_rows(logits, type, offsets), rows, columns, at<const float>(temperature),
                   at<const float>(uniform), {top_k, top_p}, at<std::int64_t>(tokens),
                   at<float>(logprobs), threads);
}

void bfloat16_product(Address left, Address right, Address out, std::int64_t rows,
                      std::int64_t columns, std::int64_t depth, std::int64_t stride,
                      Address packed, int threads) {
  fastrlhf::bfloat16_product({at<const std::uint16_t>(left), at<const std::uint16_t>(right),
                              at<float>(out), rows, columns, depth, stride,
                              at<std::uint16_t>(packed), threads});
}

void few_rows(Address left, Address right, bool half, Address bias, Address out, std::int64_t rows,
              std::int64_t columns, std::int64_t depth, Address down, Address up, std::int64_t rank,
              float scale, Address packed, Address low, int threads) {
  fastrlhf::few_rows_product({at<const float>(left), at<const void>(right), half,
                              at<const float>(bias), at<float>(out), rows, columns, depth,
                              at<const float>(down), at<const float>(up), rank, scale,
                              at<float>(packed), at<float>(low), threads});
}

void adamw_step(Address parameter, int type, Address gradient, int gradient_type,
                std::int64_t size, Address first, Address first_scales, Address second,
                Address second_scales, Address maps, Address pieces, float beta1,
                float one_minus_beta1, float beta2, float one_minus_beta2, float eps, float decay,
                float step_size, float root_correction, std::uint64_t key, bool stochastic,
                int threads) {
  using namespace fastrlhf;
  const StateMap signed_map{at<const float>(maps), at<const Piece>(pieces)};
  const StateMap unsigned_map{signed_map.values + 256, signed_map.pieces + kPieces};
  fastrlhf::adamw_step(
      {at<void>(parameter), static_cast<Type>(type), at<const void>(gradient),
       static_cast<Type>(gradient_type), size,
       {at<void>(first), at<float>(first_scales), signed_map},
       {at<void>(second), at<float>(second_scales), unsigned_map}},
      {beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, root_correction,
       static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32), stochastic},
      threads);
}

void gae(Address rewards, Address values, Address mask, std::int64_t rows, std::int64_t columns,
         double gamma, double lam, Address advantages, Address returns, int threads) {
  fastrlhf::gae(at<const float>(rewards), at<const float>(values), at<const std::uint8_t>(mask),
                rows, columns, gamma, lam, at<float>(advantages), at<float>(returns), threads);
}

void whiten(Address x, Address mask, std::int64_t n, bool center, Address partial, Address out,
            int threads) {
  fastrlhf::whiten(at<const float>(x), at<const std::uint8_t>(mask), n, center, at<double>(partial),
                   at<float>(out), threads);
}

void value_rows(Address values, Address old_values, Address returns, Address mask, std::int64_t n,
                double cliprange, Address gradient, Address partial, Address sums, int threads) {
  fastrlhf::value_rows({at<const float>(values), at<const float>(old_values),
                        at<const float>(returns), at<const std::uint8_t>(mask), n, cliprange},
                       at<float>(gradient), at<double>(partial), at<double>(sums), threads);
}

void policy_rows(Address logprobs, Address old_logprobs, Address advantages, Address mask,
                 std::int64_t n, Address entropy, Address kl, Address ref_logprobs,
                 Address weights, Address sequence_log_ratios, int loss, int estimator, double low,
                 double high, double dual_clip, double kl_coef, double old_kl_coef,
                 double entropy_coef, Address slopes, Address partial, Address sums,
                 int threads) {
  fastrlhf::policy_rows(
      {at<const float>(logprobs), at<const float>(old_logprobs), at<const float>(advantages),
       at<const std::uint8_t>(mask), n, at<const float>(entropy), at<const float>(kl),
       at<const float>(ref_logprobs), at<const float>(weights),
       at<const float>(sequence_log_ratios)},
      {static_cast<fastrlhf::Loss>(loss), static_cast<fastrlhf::KlEstimator>(estimator), low, high,
       dual_clip, kl_coef, old_kl_coef, entropy_coef},
      at<float>(slopes), at<double>(partial), at<double>(sums), threads);
}

}  // namespace

NB_MODULE(_csrc, module) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  module.attr("STATE_BYTES") = sizeof(RowState);
  module.def("row_statistics", &row_statistics, release);
  module.def("row_gradient", &row_gradient, release);
  module.def("logit_statistics", &logit_statistics, release);
  module.def("logit_gradient", &logit_gradient, release);
  module.def("compact_rows", &compact_rows, release);
  module.attr("PANEL") = fastrlhf::kPanel;
  module.def("has_bfloat16_products", &fastrlhf::has_bfloat16_products);
  module.def("bfloat16_product", &bfloat16_product, release);
  module.attr("LANES") = fastrlhf::kLanes;
  module.attr("MOST_ROWS") = fastrlhf::kMostRows;
  module.def("has_few_rows", &fastrlhf::has_few_rows);
  module.def("few_rows", &few_rows, release);
  module.def("sample", &sample, release);
  module.def("adamw_step", &adamw_step, release);
  module.def("gae", &gae, release);
  module.def("whiten", &whiten, release);
  module.def("value_rows", &value_rows, release);
  module.def("policy_rows", &policy_rows, release);
}
