// Causal attention in bf16 for CPUs that multiply it: the arguments of csrc/cpu/attention_bf16.cpp.
#pragma once

#include <cstdint>

namespace merge_norm::cpu {

// [batch, heads, length, width] in bf16, rows of width contiguous.
struct HeadsView {
  const void* data = nullptr;
  int64_t strides[3] = {};  // elements, of batch, heads and length
};

struct AttentionArgs {
  int64_t batch = 0, heads = 0, groups = 0, length = 0, width = 0;  // groups: heads of keys and values
  HeadsView q, k, v;
  HeadsView out;              // the backward pass's input; written by the forward pass
  float* log_sums = nullptr;  // [batch, heads, length], of the scaled scores' exponentials
  HeadsView grad_out, grad_q, grad_k, grad_v;
};

// Whether this CPU has the instructions and the kernels were built for it.
bool attention_runs();
constexpr int64_t kAttentionWidths = 16;  // the width is a multiple of it
void attention_forward(const AttentionArgs&);
void attention_backward(const AttentionArgs&);

}  // namespace merge_norm::cpu
