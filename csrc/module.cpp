// The Python border: pointers arrive as integers, and the GIL is released for all of the work.

#include <nanobind/nanobind.h>

#include <cstdint>

#include "rows.h"

namespace nb = nanobind;
using fastrlhf::Rows;
using fastrlhf::TableRow;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void row_statistics(Address logits, Address ref_logits, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, Address targets, Address bias, Address ref_bias,
                    Address temperature, Address table, float logit_scale, float softcap,
                    bool reverse, int threads) {
  const Rows work{at<float>(logits), at<float>(ref_logits), rows, columns, stride,
                  at<const std::int64_t>(targets), at<const float>(temperature), logit_scale,
                  softcap, reverse, threads};
  fastrlhf::row_statistics(work, at<const float>(bias), at<const float>(ref_bias),
                           at<TableRow>(table));
}

void row_gradient(Address logits, Address ref_logits, std::int64_t rows, std::int64_t columns,
                  std::int64_t stride, Address targets, Address temperature, Address table,
                  Address coefficients, float logit_scale, float softcap, bool reverse,
                  int threads) {
  const Rows work{at<float>(logits), at<float>(ref_logits), rows, columns, stride,
                  at<const std::int64_t>(targets), at<const float>(temperature), logit_scale,
                  softcap, reverse, threads};
  fastrlhf::row_gradient(work, at<const TableRow>(table), at<const float>(coefficients));
}

void compact_rows(Address logits, Address kept, std::int64_t count, std::int64_t columns,
                  std::int64_t stride, int threads) {
  fastrlhf::compact_rows(at<float>(logits), at<const std::int64_t>(kept), count, columns, stride,
                         threads);
}

void sample(Address logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
            Address temperature, Address uniform, Address tokens, Address logprobs, int threads) {
  fastrlhf::sample(at<const float>(logits), rows, columns, stride, at<const float>(temperature),
                   at<const float>(uniform), at<std::int64_t>(tokens), at<float>(logprobs),
                   threads);
}

}  // namespace

NB_MODULE(_csrc, module) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  module.def("row_statistics", &row_statistics, release);
  module.def("row_gradient", &row_gradient, release);
  module.def("compact_rows", &compact_rows, release);
  module.def("sample", &sample, release);
}
