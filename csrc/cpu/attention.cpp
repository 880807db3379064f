// Causal attention on torch tensors; megatron_iiet/ops/attention.py is its face.
#include "attention.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <tuple>

namespace merge_norm::cpu {
namespace {

using at::Tensor;

// The kernels are AVX-512's, which ATEN_CPU_CAPABILITY=default|avx2 forbids.
bool has_attention() {
  static const bool has = at::get_cpu_capability() == std::string("AVX512") && attention_runs();
  return has;
}

HeadsView view_of(const Tensor& tensor) {
  HeadsView view;
  view.data = tensor.const_data_ptr();
  for (int i = 0; i < 3; ++i) view.strides[i] = tensor.stride(i);
  return view;
}

Tensor rows_contiguous(const Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

void check_shape(const Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.scalar_type() == at::kBFloat16, name, " is ", tensor.sizes(), " ",
                    tensor.scalar_type(), ", expected ", shape, " BFloat16");
}

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(has_attention(), "this CPU does not multiply bf16 (AVX512-BF16), or the kernels were built without");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "q is ", q.sizes(), " and k ", k.sizes(),
                    ", expected [B, H, T, K] and [B, G, T, K]");
  AttentionArgs args;
  args.batch = q.size(0), args.heads = q.size(1), args.length = q.size(2), args.width = q.size(3);
  args.groups = k.size(1);
  TORCH_CHECK_VALUE(args.width > 0 && args.width % kAttentionWidths == 0 && args.groups > 0 &&
                        args.heads % args.groups == 0,
                    "q is ", q.sizes(), " and k ", k.sizes(), ": the width of a head is a multiple of ",
                    kAttentionWidths, ", the heads of q one of those of k");
  check_shape(q, q.sizes(), "q");
  for (const Tensor* tensor : {&k, &v}) {
    check_shape(*tensor, {args.batch, args.groups, args.length, args.width}, tensor == &k ? "k" : "v");
  }
  return args;
}

// [B, T, heads, K] in memory, as the map that follows reads it.
Tensor empty_heads(const Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  AttentionArgs args = arguments(q, k, v);
  const Tensor queries = rows_contiguous(q), keys = rows_contiguous(k), values = rows_contiguous(v);
  Tensor out = empty_heads(q);
  Tensor log_sums = at::empty({args.batch, args.heads, args.length}, q.options().dtype(at::kFloat));
  args.q = view_of(queries), args.k = view_of(keys), args.v = view_of(values), args.out = view_of(out);
  args.log_sums = log_sums.mutable_data_ptr<float>();
  attention_forward(args);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> attention_gradients(const Tensor& gradient, const Tensor& q, const Tensor& k,
                                                       const Tensor& v, const Tensor& out, const Tensor& log_sums) {
  AttentionArgs args = arguments(q, k, v);
  check_shape(gradient, q.sizes(), "gradient");
  check_shape(out, q.sizes(), "out");
  TORCH_CHECK_VALUE(log_sums.sizes() == at::IntArrayRef({args.batch, args.heads, args.length}) &&
                        log_sums.scalar_type() == at::kFloat && log_sums.is_contiguous(),
                    "log_sums is ", log_sums.sizes(), " ", log_sums.scalar_type(), ", expected fp32 [", args.batch, ", ",
                    args.heads, ", ", args.length, "], contiguous");
  const Tensor queries = rows_contiguous(q), keys = rows_contiguous(k), values = rows_contiguous(v);
  const Tensor given = rows_contiguous(gradient), made = rows_contiguous(out);
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(k), grad_v = empty_heads(v);
  args.q = view_of(queries), args.k = view_of(keys), args.v = view_of(values), args.out = view_of(made);
  args.grad_out = view_of(given);
  args.grad_q = view_of(grad_q), args.grad_k = view_of(grad_k), args.grad_v = view_of(grad_v);
  args.log_sums = const_cast<float*>(log_sums.const_data_ptr<float>());
  attention_backward(args);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace merge_norm::cpu

TORCH_LIBRARY_IMPL(megatron_iiet, CompositeExplicitAutograd, m) {
  m.impl("has_attention", merge_norm::cpu::has_attention);
}

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) {
  m.impl("attention", merge_norm::cpu::attention);
  m.impl("attention_gradients", merge_norm::cpu::attention_gradients);
}
