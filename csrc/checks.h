// What every device's operators demand of their arguments. Python checks with better words before it calls
// them; these keep a direct call from reading what is not there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace merge_norm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_like(const Tensor& tensor, const Tensor& like, const std::string& name) {
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes() && tensor.scalar_type() == like.scalar_type() &&
                        tensor.device() == like.device(),
                    name, " is ", tensor.sizes(), " ", tensor.scalar_type(), " on ", tensor.device(), ", expected ",
                    like.sizes(), " ", like.scalar_type(), " on ", like.device());
}

inline void check_all_like(at::TensorList tensors, const Tensor& like, const char* name) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_like(tensors[i], like, std::string(name) + "[" + std::to_string(i) + "]");
  }
}

inline void check_storage(const Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name, " is ", type,
                    ", expected fp32, bf16 or fp16");
  TORCH_CHECK_VALUE(tensor.dim() > 0, name, " has no dimension, expected [..., d]");
}

// Coefficients [k] or [R, k], fp32, on the slabs' device.
inline void check_coefficients(const Tensor& coefficients, int64_t k, const Tensor& like, bool may_have_rows) {
  TORCH_CHECK_VALUE(coefficients.scalar_type() == at::kFloat && coefficients.device() == like.device() &&
                        coefficients.dim() >= 1 && coefficients.dim() <= (may_have_rows ? 2 : 1) &&
                        coefficients.size(-1) == k,
                    "coefficients is ", coefficients.sizes(), " ", coefficients.scalar_type(), " on ",
                    coefficients.device(), ", expected fp32 [", k, "]", may_have_rows ? " or [rows, k]" : "", " on ",
                    like.device());
}

// A norm weight [h], or [R, h] with coefficient rows; S or fp32.
inline void check_weight(const Tensor& weight, int64_t h, int64_t rows, const Tensor& like) {
  const bool shared = weight.dim() == 1 && weight.size(0) == h;
  const bool per_row = weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == h;
  TORCH_CHECK_VALUE((shared || per_row) && weight.device() == like.device() &&
                        (weight.scalar_type() == at::kFloat || weight.scalar_type() == like.scalar_type()),
                    "norm_weight is ", weight.sizes(), " ", weight.scalar_type(), " on ", weight.device(),
                    ", expected [", h, "] or [", rows, ", ", h, "] on ", like.device());
}

}  // namespace merge_norm
