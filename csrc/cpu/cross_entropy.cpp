// Cross-entropy on torch tensors; megatron_iiet/parallel/head_loss.py has the formulas.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../operators.h"
#include "kernels.h"

namespace merge_norm::cpu {
namespace {

CrossEntropyArgs cross_entropy_args(const Tensor& logits, const Tensor& columns) {
  check_storage(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, "logits is ", logits.sizes(),
                    ", expected [n, V], contiguous, V > 0");
  TORCH_CHECK_VALUE(columns.scalar_type() == at::kLong && columns.sizes() == logits.sizes().slice(0, 1) &&
                        columns.is_contiguous() && columns.device() == logits.device(),
                    "columns is ", columns.sizes(), " ", columns.scalar_type(), ", expected int64 [", logits.size(0),
                    "], contiguous");
  CrossEntropyArgs args;
  args.storage = storage_of(logits);
  args.rows = logits.size(0);
  args.width = logits.size(1);
  args.logits = logits.data_ptr();
  args.columns = columns.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < args.rows; ++row) {
    TORCH_CHECK_INDEX(args.columns[row] < args.width, "columns[", row, "] is ", args.columns[row],
                      ", beyond the logits' ", args.width);
  }
  return args;
}

Tensor cross_entropy_parts(const Tensor& logits, const Tensor& columns) {
  CrossEntropyArgs args = cross_entropy_args(logits, columns);
  Tensor parts = at::empty({3, args.rows}, logits.options().dtype(at::kFloat));
  args.parts = parts.mutable_data_ptr<float>();
  kernels().cross_entropy(args);
  return parts;
}

Tensor& cross_entropy_gradient_(Tensor& logits, const Tensor& columns, const Tensor& tops, const Tensor& shares,
                                const Tensor& factors) {
  CrossEntropyArgs args = cross_entropy_args(logits, columns);
  const auto floats_of = [&](const Tensor& given, const char* name) {
    TORCH_CHECK_VALUE(given.scalar_type() == at::kFloat && given.sizes() == columns.sizes() && given.is_contiguous() &&
                          given.device() == logits.device(),
                      name, " is ", given.sizes(), " ", given.scalar_type(), ", expected fp32 [", args.rows,
                      "], contiguous");
    return given.const_data_ptr<float>();
  };
  args.tops = floats_of(tops, "tops");
  args.shares = floats_of(shares, "shares");
  args.factors = floats_of(factors, "factors");
  kernels().cross_entropy(args);
  return logits;
}

}  // namespace
}  // namespace merge_norm::cpu

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) {
  m.impl("cross_entropy_parts", merge_norm::cpu::cross_entropy_parts);
  m.impl("cross_entropy_gradient_", merge_norm::cpu::cross_entropy_gradient_);
}
