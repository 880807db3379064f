// The operators on torch tensors, for any device: checks, layouts, results. A Device has
//
//   static constexpr bool kFloatWeights            whether its kernels take norm weights in fp32 only
//   static void check_limits(hidden, tensors, name)
//   static void forward(args, like), backward(args, like), transposed(args, like)
//
// and gets the arguments of merge_norm/api.h; `like` is a tensor on the device in question. Python checks
// with better words before it calls; the checks here keep a direct call from reading what is not there.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "merge_norm/api.h"

namespace merge_norm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ------------------------------------------------------------------------------------------------

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

// A norm weight [h], S or fp32.
inline void check_weight(const Tensor& weight, int64_t h, const Tensor& like) {
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == h && weight.device() == like.device() &&
                        (weight.scalar_type() == at::kFloat || weight.scalar_type() == like.scalar_type()),
                    "norm_weight is ", weight.sizes(), " ", weight.scalar_type(), " on ", weight.device(),
                    ", expected [", h, "] on ", like.device());
}

inline void check_statistics(const Tensor& rstd, const Tensor& like) {
  TORCH_CHECK_VALUE(rstd.scalar_type() == at::kFloat && rstd.device() == like.device() &&
                        rstd.sizes() == like.sizes().slice(0, like.dim() - 1),
                    "rstd is ", rstd.sizes(), " ", rstd.scalar_type(), " on ", rstd.device(),
                    ", expected fp32, one for each row of ", like.sizes(), ", on ", like.device());
}

// ---- layouts -----------------------------------------------------------------------------------------------

constexpr int64_t kEmpty[] = {0};  // the shape of a result that is not wanted

// Contiguous slabs, kept alive while their addresses are in use. (Of device memory, until the kernels that read
// it are launched: what is freed after that is given only to later work of the same stream.)
class Slabs {
 public:
  explicit Slabs(at::TensorList tensors) {
    for (const Tensor& tensor : tensors) {
      tensors_.push_back(tensor.contiguous());
      pointers_.push_back(tensors_.back().data_ptr());
    }
  }
  const void* const* inputs() const { return pointers_.data(); }
  void* const* outputs() const { return pointers_.data(); }

 private:
  std::vector<Tensor> tensors_;
  std::vector<void*> pointers_;
};

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

template <typename Device> OptionalTensor contiguous_weight(const OptionalTensor& weight) {
  if (Device::kFloatWeights && weight) return weight->to(at::kFloat).contiguous();
  return contiguous(weight);
}

inline const void* address(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline const float* floats(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

inline NormWeight norm_weight_of(const OptionalTensor& weight) {
  if (!weight) return {};
  return {weight->const_data_ptr(), weight->scalar_type() == at::kFloat};
}

inline bool has_rows(const OptionalTensor& coefficients) { return coefficients && coefficients->dim() == 2; }

inline void check_no_rows(const OptionalTensor& coefficients) {
  TORCH_CHECK_VALUE(!has_rows(coefficients), "coefficients is ", coefficients->sizes(),
                    ", but a norm is of one merge: expected [", coefficients->size(-1), "]");
}

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return Storage::bfloat16;
    case at::kHalf: return Storage::float16;
    default: return Storage::float32;
  }
}

// ---- operators ---------------------------------------------------------------------------------------------

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> merge_norm(const OptionalTensor& residual, at::TensorList increments,
                                              const OptionalTensor& coefficients, const OptionalTensor& norm_weight,
                                              double eps) {
  TORCH_CHECK_VALUE(residual || !increments.empty(), "residual is None and increments is empty");
  const Tensor& like = residual ? *residual : increments[0];
  check_storage(like, residual ? "residual" : "increments[0]");
  check_all_like(increments, like, "increments");
  const int64_t k = static_cast<int64_t>(increments.size()), h = like.size(-1);
  const int64_t R = has_rows(coefficients) ? coefficients->size(0) : 1;
  Device::check_limits(h, k, "increments");
  if (coefficients) check_coefficients(*coefficients, k, like, true);
  if (norm_weight) {
    check_weight(*norm_weight, h, like);
    check_no_rows(coefficients);
  }
  TORCH_CHECK_VALUE(k > 0 || R == 1, "coefficients has rows but increments is empty");

  std::vector<int64_t> sizes = like.sizes().vec();
  if (has_rows(coefficients)) sizes.insert(sizes.begin(), R);
  const at::IntArrayRef one = like.sizes(), none(kEmpty);
  Tensor merged = at::empty(k > 0 ? at::IntArrayRef(sizes) : none, like.options());
  Tensor normed = at::empty(norm_weight ? one : none, like.options());
  Tensor rstd = at::empty(norm_weight ? one.slice(0, one.size() - 1) : none, like.options().dtype(at::kFloat));
  if (like.numel() == 0 || R == 0) return {merged, normed, rstd.zero_()};

  const OptionalTensor base = contiguous(residual), row = contiguous(coefficients);
  const OptionalTensor weight = contiguous_weight<Device>(norm_weight);
  const Slabs slabs(increments);
  ForwardArgs args;
  args.storage = storage_of(like);
  args.rows = like.numel() / h;
  args.hidden = h;
  args.coefficient_rows = R;
  args.residual = address(base);
  args.increments = slabs.inputs();
  args.n_increments = k;
  args.coefficients = floats(row);
  args.norm_weight = norm_weight_of(weight);
  args.eps = static_cast<float>(eps);
  args.merged = k > 0 ? merged.data_ptr() : nullptr;
  args.normed = norm_weight ? normed.data_ptr() : nullptr;
  args.rstd = norm_weight ? rstd.data_ptr<float>() : nullptr;
  Device::forward(args, like);
  return {merged, normed, rstd};
}

template <typename Device>
std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor> merge_norm_backward(
    const OptionalTensor& grad_merged, const OptionalTensor& grad_normed, const OptionalTensor& merged,
    const OptionalTensor& rstd, const OptionalTensor& norm_weight, at::TensorList increments,
    const OptionalTensor& coefficients, bool want_increments, bool want_coefficients) {
  TORCH_CHECK_VALUE(grad_merged || grad_normed, "grad_merged and grad_normed are both None");
  const Tensor& like = grad_merged ? *grad_merged : *grad_normed;
  check_storage(like, grad_merged ? "grad_merged" : "grad_normed");
  const int64_t k = static_cast<int64_t>(increments.size()), h = like.size(-1);
  const int64_t R = has_rows(coefficients) ? coefficients->size(0) : 1;
  Device::check_limits(h, k, "increments");
  Device::check_limits(h, R, "coefficients");
  TORCH_CHECK_VALUE(!has_rows(coefficients) || (like.dim() > 1 && like.size(0) == R), "the gradient is ", like.sizes(),
                    ", expected [", R, ", ...]");
  if (coefficients) check_coefficients(*coefficients, k, like, true);
  if (k > 0 && R > 0) check_all_like(increments, has_rows(coefficients) ? like[0] : like, "increments");
  if (grad_normed) {
    TORCH_CHECK_VALUE(merged && rstd && norm_weight, "grad_normed needs merged, rstd and norm_weight");
    check_like(*grad_normed, like, "grad_normed");
    check_like(*merged, like, "merged");
    check_weight(*norm_weight, h, like);
    check_statistics(*rstd, like);
    check_no_rows(coefficients);
  }
  want_increments = want_increments && coefficients;
  want_coefficients = want_coefficients && coefficients;

  const auto fp32 = like.options().dtype(at::kFloat);
  const at::IntArrayRef none(kEmpty);
  Tensor grad_base = at::empty(grad_normed ? like.sizes() : none, like.options());
  Tensor grad_weight = at::zeros(grad_normed ? norm_weight->sizes() : none, fp32);
  Tensor grad_coefficients = at::zeros(want_coefficients ? coefficients->sizes() : none, fp32);
  std::vector<Tensor> grad_increments;
  for (int64_t j = 0; want_increments && j < k; ++j) {
    grad_increments.push_back(at::empty(increments[j].sizes(), like.options()));
  }
  if (like.numel() == 0) {
    for (Tensor& gradient : grad_increments) gradient.zero_();  // no rows: a sum of nothing
    return {grad_base, grad_weight, grad_increments, grad_coefficients};
  }

  const OptionalTensor of_merged = contiguous(grad_merged), of_normed = contiguous(grad_normed);
  const OptionalTensor base = contiguous(merged), statistics = contiguous(rstd), row = contiguous(coefficients);
  const OptionalTensor weight = contiguous_weight<Device>(norm_weight);
  const Slabs slabs(increments), results(grad_increments);
  BackwardArgs args;
  args.storage = storage_of(like);
  args.rows = like.numel() / h / R;
  args.hidden = h;
  args.coefficient_rows = R;
  args.grad_merged = address(of_merged);
  if (grad_normed) {
    args.grad_normed = address(of_normed);
    args.merged = address(base);
    args.rstd = floats(statistics);
    args.norm_weight = norm_weight_of(weight);
    args.grad_base = grad_base.data_ptr();
    args.grad_norm_weight = grad_weight.data_ptr<float>();
  }
  args.increments = slabs.inputs();
  args.n_increments = want_increments || want_coefficients ? k : 0;
  args.coefficients = floats(row);
  args.grad_increments = want_increments ? results.outputs() : nullptr;
  args.grad_coefficients = want_coefficients ? grad_coefficients.data_ptr<float>() : nullptr;
  Device::backward(args, like);
  return {grad_base, grad_weight, grad_increments, grad_coefficients};
}

template <typename Device>
std::tuple<Tensor, Tensor> transposed_merge(const OptionalTensor& direct, const Tensor& increment,
                                            at::TensorList gradients, const Tensor& coefficients,
                                            bool want_coefficients) {
  const int64_t M = static_cast<int64_t>(gradients.size());
  TORCH_CHECK_VALUE(M > 0, "gradients is empty");
  check_storage(increment, "increment");
  Device::check_limits(0, M, "gradients");
  if (direct) check_like(*direct, increment, "direct");
  check_all_like(gradients, increment, "gradients");
  check_coefficients(coefficients, M, increment, false);

  Tensor grad_increment = at::empty(increment.sizes(), increment.options());
  Tensor grad_coefficients = at::zeros({want_coefficients ? M : 0}, increment.options().dtype(at::kFloat));
  if (increment.numel() == 0) return {grad_increment, grad_coefficients};

  const OptionalTensor of_direct = contiguous(direct);
  const Tensor slab = increment.contiguous(), row = coefficients.contiguous();
  const Slabs slabs(gradients);
  TransposedArgs args;
  args.storage = storage_of(increment);
  args.hidden = increment.size(-1);
  args.rows = increment.numel() / args.hidden;
  args.direct = address(of_direct);
  args.increment = want_coefficients ? slab.const_data_ptr() : nullptr;
  args.gradients = slabs.inputs();
  args.n_gradients = M;
  args.coefficients = row.const_data_ptr<float>();
  args.grad_increment = grad_increment.data_ptr();
  args.grad_coefficients = want_coefficients ? grad_coefficients.data_ptr<float>() : nullptr;
  Device::transposed(args, increment);
  return {grad_increment, grad_coefficients};
}

}  // namespace merge_norm
