// The operators of the extension, for every device. Python's face of them is megatron_iiet/ops/.
//
// S is the storage type (fp32, bf16 or fp16) of all slabs; coefficients, statistics and sums are fp32, the norm
// weight is S or fp32. A result that is not wanted is an empty tensor, [0].
//
// merge_norm           merged = residual + Σ_j coefficients[j] · increments[j], rounded to S, then
//                      normed = merged · rstd · norm_weight with rstd = 1/rms of the rounded merge.
//                      Without increments the residual is normed. If coefficients is [R, k], merged is [R, ...],
//                      a merge for each row, and there is no norm.
// merge_norm_backward  grad_base = grad_merged + the norm's gradient (empty without a norm: it is grad_merged),
//                      the norm weight's gradient, and of the rounded grad_base: each increment's gradient and
//                      the coefficients'.
// transposed_merge     what one increment receives from all that merged it:
//                      direct + Σ_m coefficients[m] · gradients[m], and ⟨increment, gradients[m]⟩ from the same
//                      reading.
// swiglu               silu(gate) · up of [gate; up], and swiglu_backward the gradient of [gate; up]; rotated_heads
//                      [q; k; v] of its parts, the first two rotated. On the CPU only: csrc/cpu/pointwise.cpp.
// cross_entropy_parts  of rows of logits [n, V] and the targets' columns: maximum, sum of exponentials below it, the
//                      target's logit (0 where the column is negative), [3, n]; cross_entropy_gradient_ writes
//                      exp(logit - top) · share - [target] · factor over them. On the CPU only: csrc/cpu/cross_entropy.cpp.
// attention            causal, of q [B, H, T, K], k and v [B, G, T, K] in bf16: the output and, for the backward pass,
//                      the logarithm of each query's sum of exponentials, fp32 [B, H, T]; attention_gradients those of
//                      q, k and v. Where has_attention: csrc/cpu/attention_bf16.cpp.
// pack_documents       documents in bins, on the CPU only: csrc/cpu/packing.cpp.
#include <torch/library.h>

TORCH_LIBRARY(megatron_iiet, m) {
  m.def(
      "merge_norm(Tensor? residual, Tensor[] increments, Tensor? coefficients, Tensor? norm_weight, float eps)"
      " -> (Tensor merged, Tensor normed, Tensor rstd)");
  m.def(
      "merge_norm_backward(Tensor? grad_merged, Tensor? grad_normed, Tensor? merged, Tensor? rstd,"
      " Tensor? norm_weight, Tensor[] increments, Tensor? coefficients, bool want_increments,"
      " bool want_coefficients)"
      " -> (Tensor grad_base, Tensor grad_norm_weight, Tensor[] grad_increments, Tensor grad_coefficients)");
  m.def(
      "transposed_merge(Tensor? direct, Tensor increment, Tensor[] gradients, Tensor coefficients,"
      " bool want_coefficients) -> (Tensor grad_increment, Tensor grad_coefficients)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor gradient, Tensor gate_up) -> Tensor");
  m.def("rotated_heads(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor signed_sin) -> Tensor");
  m.def("cross_entropy_parts(Tensor logits, Tensor columns) -> Tensor");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor columns, Tensor tops, Tensor shares, Tensor factors)"
      " -> Tensor(a!)");
  m.def("has_attention() -> bool");
  m.def("attention(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor log_sums)");
  m.def(
      "attention_gradients(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("pack_documents(Tensor documents, int start, int stop, int bins, int capacity) -> Tensor packing");
}
