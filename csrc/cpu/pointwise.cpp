// SwiGLU's product and the rotary embedding on torch tensors; megatron_iiet/ops/pointwise.py has the formulas.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../operators.h"
#include "kernels.h"

namespace merge_norm::cpu {
namespace {

SwigluArgs swiglu_args(const Tensor& gate_up) {
  check_storage(gate_up, "gate_up");
  TORCH_CHECK_VALUE(gate_up.size(-1) % 2 == 0, "gate_up is ", gate_up.sizes(), ", expected [..., 2M]");
  SwigluArgs args;
  args.storage = storage_of(gate_up);
  args.width = gate_up.size(-1) / 2;
  args.rows = args.width ? gate_up.numel() / (2 * args.width) : 0;
  return args;
}

Tensor swiglu(const Tensor& gate_up) {
  SwigluArgs args = swiglu_args(gate_up);
  const Tensor given = gate_up.contiguous();
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() = args.width;
  Tensor out = at::empty(shape, gate_up.options());
  args.gate_up = given.const_data_ptr();
  args.out = out.mutable_data_ptr();
  kernels().swiglu(args);
  return out;
}

Tensor swiglu_backward(const Tensor& gradient, const Tensor& gate_up) {
  SwigluArgs args = swiglu_args(gate_up);
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() = args.width;
  TORCH_CHECK_VALUE(gradient.sizes() == shape && gradient.scalar_type() == gate_up.scalar_type(), "gradient is ",
                    gradient.sizes(), " ", gradient.scalar_type(), ", expected ", at::IntArrayRef(shape), " ",
                    gate_up.scalar_type());
  const Tensor given = gate_up.contiguous(), of_product = gradient.contiguous();
  Tensor out = at::empty(gate_up.sizes(), gate_up.options());
  args.gate_up = given.const_data_ptr();
  args.gradient = of_product.const_data_ptr();
  args.out = out.mutable_data_ptr();
  kernels().swiglu(args);
  return out;
}

Tensor rotated_heads(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& signed_sin) {
  check_storage(q, "q");
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) % 2 == 0, "q is ", q.sizes(), ", expected [B, H, T, K], K even");
  const int64_t B = q.size(0), T = q.size(2), K = q.size(3);
  HeadsArgs args;
  args.storage = storage_of(q);
  args.batch = B, args.length = T, args.width = K;
  Tensor parts[3] = {q, k, v};
  for (int i = 0; i < 3; ++i) {
    Tensor& part = parts[i];
    TORCH_CHECK_VALUE(part.dim() == 4 && part.size(0) == B && part.size(2) == T && part.size(3) == K &&
                          part.scalar_type() == q.scalar_type(),
                      "qkv"[i], " is ", part.sizes(), " ", part.scalar_type(), ", expected [", B, ", heads, ", T, ", ",
                      K, "] ", q.scalar_type());
    if (part.stride(3) != 1) part = part.contiguous();
    args.parts[i] = part.const_data_ptr();
    args.heads[i] = part.size(1);
    for (int d = 0; d < 3; ++d) args.strides[i][d] = part.stride(d);
  }
  for (const Tensor* table : {&cos, &signed_sin}) {
    const bool fits = table->sizes() == at::IntArrayRef({T, K}) || table->sizes() == at::IntArrayRef({B, 1, T, K});
    TORCH_CHECK_VALUE(fits && table->sizes() == cos.sizes() && table->scalar_type() == q.scalar_type(),
                      "a rotary table is ", table->sizes(), " ", table->scalar_type(), ", expected [", T, ", ", K,
                      "] or [", B, ", 1, ", T, ", ", K, "] ", q.scalar_type());
  }
  const Tensor cosines = cos.contiguous(), sines = signed_sin.contiguous();
  args.cos = cosines.const_data_ptr();
  args.sin = sines.const_data_ptr();
  args.tables_by_sample = cos.dim() == 4;
  Tensor out = at::empty({B, T, (args.heads[0] + args.heads[1] + args.heads[2]) * K}, q.options());
  args.out = out.mutable_data_ptr();
  kernels().heads(args);
  return out;
}

}  // namespace
}  // namespace merge_norm::cpu

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) {
  m.impl("swiglu", merge_norm::cpu::swiglu);
  m.impl("swiglu_backward", merge_norm::cpu::swiglu_backward);
  m.impl("rotated_heads", merge_norm::cpu::rotated_heads);
}
