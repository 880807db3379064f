// The operators on CPU tensors: checks, layouts, and the choice of instruction set.
#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace merge_norm::cpu {
namespace {

// torch's own choice, which ATEN_CPU_CAPABILITY=default|avx2 lowers.
const Kernels& kernels() {
#ifdef MERGE_NORM_X86
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512();
    if (capability == "AVX2") return kernels_avx2();
    return kernels_default();
  }();
  return chosen;
#else
  return kernels_default();
#endif
}

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return Storage::kBFloat16;
    case at::kHalf: return Storage::kHalf;
    default: return Storage::kFloat;
  }
}

// Contiguous slabs, kept alive while their addresses are in use.
class Slabs {
 public:
  explicit Slabs(at::TensorList tensors) {
    for (const Tensor& tensor : tensors) add(tensor.contiguous());
  }
  void add(Tensor tensor) {
    pointers_.push_back(tensor.data_ptr());
    tensors_.push_back(std::move(tensor));
  }
  void* const* data() const { return pointers_.data(); }

 private:
  std::vector<Tensor> tensors_;
  std::vector<void*> pointers_;
};

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

OptionalTensor contiguous_fp32(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->to(at::kFloat).contiguous()) : tensor;
}

const void* address(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

const float* floats(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

Tensor coefficients_or_ones(const OptionalTensor& coefficients, int64_t k, const Tensor& like) {
  return coefficients ? coefficients->contiguous() : at::ones({k}, like.options().dtype(at::kFloat));
}

// [R, ...] for coefficient rows, else [...].
std::vector<int64_t> with_rows(const OptionalTensor& coefficients, at::IntArrayRef sizes) {
  std::vector<int64_t> result;
  if (coefficients && coefficients->dim() == 2) result.push_back(coefficients->size(0));
  result.insert(result.end(), sizes.begin(), sizes.end());
  return result;
}

int64_t rows_of(const OptionalTensor& coefficients) {
  return coefficients && coefficients->dim() == 2 ? coefficients->size(0) : 1;
}

std::tuple<Tensor, Tensor, Tensor> merge_norm(const OptionalTensor& residual, at::TensorList increments,
                                              const OptionalTensor& coefficients, const OptionalTensor& norm_weight,
                                              double eps) {
  TORCH_CHECK_VALUE(residual || !increments.empty(), "residual is None and increments is empty");
  const Tensor& like = residual ? *residual : increments[0];
  check_storage(like, residual ? "residual" : "increments[0]");
  check_all_like(increments, like, "increments");
  const int64_t k = increments.size(), h = like.size(-1), R = rows_of(coefficients);
  if (coefficients) check_coefficients(*coefficients, k, like, true);
  if (norm_weight) check_weight(*norm_weight, h, R, like);

  const auto sizes = with_rows(coefficients, like.sizes());
  const auto fp32 = like.options().dtype(at::kFloat);
  Tensor merged = k ? at::empty(sizes, like.options()) : at::empty({0}, like.options());
  Tensor normed = norm_weight ? at::empty(sizes, like.options()) : at::empty({0}, like.options());
  Tensor rstd = norm_weight ? at::empty(at::IntArrayRef(sizes).slice(0, sizes.size() - 1), fp32) : at::empty({0}, fp32);
  TORCH_CHECK_VALUE(k || R == 1, "coefficients has rows but increments is empty");
  if (like.numel() == 0 || R == 0) return {merged, normed, rstd};

  const auto base = contiguous(residual), weight = contiguous_fp32(norm_weight);
  const Slabs slabs(increments);
  const Tensor row = coefficients_or_ones(coefficients, k, like);
  ForwardArgs args{};
  args.storage = storage_of(like);
  args.T = like.numel() / h, args.h = h, args.R = R, args.k = k;
  args.residual = address(base);
  args.increments = slabs.data();
  args.coefficients = row.const_data_ptr<float>();
  args.norm_weight = floats(weight);
  args.weight_per_row = weight && weight->dim() == 2;
  args.eps = static_cast<float>(eps);
  args.merged = k ? merged.data_ptr() : nullptr;
  args.normed = norm_weight ? normed.data_ptr() : nullptr;
  args.rstd = norm_weight ? rstd.data_ptr<float>() : nullptr;
  kernels().forward(args);
  return {merged, normed, rstd};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor> merge_norm_backward(
    const OptionalTensor& grad_merged, const OptionalTensor& grad_normed, const OptionalTensor& merged,
    const OptionalTensor& rstd, const OptionalTensor& norm_weight, at::TensorList increments,
    const OptionalTensor& coefficients, bool want_increments, bool want_coefficients) {
  TORCH_CHECK_VALUE(grad_merged || grad_normed, "grad_merged and grad_normed are both None");
  const Tensor& like = grad_merged ? *grad_merged : *grad_normed;
  const int64_t k = increments.size(), h = like.size(-1), R = rows_of(coefficients);
  const bool rows = coefficients && coefficients->dim() == 2;
  check_storage(like, "gradient");
  TORCH_CHECK_VALUE(!rows || (like.dim() > 1 && like.size(0) == R), "gradient is ", like.sizes(), ", expected [", R,
                    ", ...]");
  if (coefficients) check_coefficients(*coefficients, k, like, true);
  if (k) check_all_like(increments, rows ? like[0] : like, "increments");
  if (grad_normed) {
    TORCH_CHECK_VALUE(merged && rstd && norm_weight, "grad_normed needs merged, rstd and norm_weight");
    check_like(*grad_normed, like, "grad_normed");
    check_like(*merged, like, "merged");
    check_weight(*norm_weight, h, R, like);
    TORCH_CHECK_VALUE(rstd->scalar_type() == at::kFloat && rstd->sizes() == like.sizes().slice(0, like.dim() - 1),
                      "rstd is ", rstd->sizes(), " ", rstd->scalar_type(), ", expected fp32, one for each row of ",
                      like.sizes());
  }
  want_increments = want_increments && coefficients;
  want_coefficients = want_coefficients && coefficients;

  const auto fp32 = like.options().dtype(at::kFloat);
  Tensor grad_base = at::empty(grad_normed ? like.sizes() : at::IntArrayRef{0}, like.options());
  Tensor grad_weight = at::zeros(grad_normed ? norm_weight->sizes() : at::IntArrayRef{0}, fp32);
  Tensor grad_coefficients = at::zeros(want_coefficients ? coefficients->sizes() : at::IntArrayRef{0}, fp32);
  std::vector<Tensor> grad_increments;
  for (int64_t j = 0; want_increments && j < k; ++j) {
    grad_increments.push_back(at::empty(increments[j].sizes(), like.options()));
  }
  if (like.numel() == 0) return {grad_base, grad_weight, grad_increments, grad_coefficients};

  const auto of_merged = contiguous(grad_merged), of_normed = contiguous(grad_normed), base = contiguous(merged);
  const auto statistics = contiguous(rstd), weight = contiguous_fp32(norm_weight);
  const Slabs slabs(increments);
  const Slabs results(grad_increments);
  const Tensor row = coefficients_or_ones(coefficients, k, like);
  BackwardArgs args{};
  args.storage = storage_of(like);
  args.T = like.numel() / h / R, args.h = h, args.R = R;
  args.k = want_increments || want_coefficients ? k : 0;
  args.grad_merged = address(of_merged);
  args.grad_normed = address(of_normed);
  args.merged = address(base);
  args.rstd = floats(statistics);
  args.norm_weight = floats(weight);
  args.weight_per_row = grad_normed && norm_weight->dim() == 2;
  args.increments = slabs.data();
  args.coefficients = row.const_data_ptr<float>();
  args.grad_base = grad_normed ? grad_base.data_ptr() : nullptr;
  args.grad_norm_weight = grad_normed ? grad_weight.data_ptr<float>() : nullptr;
  args.grad_increments = want_increments ? results.data() : nullptr;
  args.grad_coefficients = want_coefficients ? grad_coefficients.data_ptr<float>() : nullptr;
  kernels().backward(args);
  return {grad_base, grad_weight, grad_increments, grad_coefficients};
}

std::tuple<Tensor, Tensor> transposed_merge(const OptionalTensor& direct, const Tensor& increment,
                                            at::TensorList gradients, const Tensor& coefficients,
                                            bool want_coefficients) {
  const int64_t M = gradients.size();
  check_storage(increment, "increment");
  if (direct) check_like(*direct, increment, "direct");
  check_all_like(gradients, increment, "gradients");
  check_coefficients(coefficients, M, increment, false);

  const auto fp32 = increment.options().dtype(at::kFloat);
  Tensor grad_increment = at::empty(increment.sizes(), increment.options());
  Tensor grad_coefficients = at::zeros({want_coefficients ? M : 0}, fp32);
  if (increment.numel() == 0) return {grad_increment, grad_coefficients};

  const auto of_direct = contiguous(direct);
  const Tensor slab = increment.contiguous(), row = coefficients.contiguous();
  const Slabs slabs(gradients);
  TransposedArgs args{};
  args.storage = storage_of(increment);
  args.size = increment.numel(), args.M = M;
  args.direct = address(of_direct);
  args.increment = slab.const_data_ptr();
  args.gradients = slabs.data();
  args.coefficients = row.const_data_ptr<float>();
  args.grad_increment = grad_increment.data_ptr();
  args.grad_coefficients = want_coefficients ? grad_coefficients.data_ptr<float>() : nullptr;
  kernels().transposed(args);
  return {grad_increment, grad_coefficients};
}

}  // namespace
}  // namespace merge_norm::cpu

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) {
  m.impl("merge_norm", merge_norm::cpu::merge_norm);
  m.impl("merge_norm_backward", merge_norm::cpu::merge_norm_backward);
  m.impl("transposed_merge", merge_norm::cpu::transposed_merge);
}
