// The CPU kernels, one table for each instruction set. Arguments of merges are those of merge_norm/api.h, but norm
// weights are fp32 and there is no workspace.
#pragma once

#include "merge_norm/api.h"

namespace merge_norm::cpu {

// Rows [gate; up] of 2 · width, and rows of width.
struct SwigluArgs {
  Storage storage = Storage::float32;
  int64_t rows = 0, width = 0;
  const void* gate_up = nullptr;
  const void* gradient = nullptr;  // [rows, width], of the product; nullptr: the product is wanted
  void* out = nullptr;             // the product, or the gradient of gate_up
};

// Queries, keys and values, [B, heads, T, K] each, rows of K contiguous, to [B, T, all heads · K].
struct HeadsArgs {
  Storage storage = Storage::float32;
  int64_t batch = 0, length = 0, width = 0;
  const void* parts[3] = {};
  int64_t heads[3] = {};
  int64_t strides[3][3] = {};                // elements, of B, heads and T
  const void *cos = nullptr, *sin = nullptr; // [T, K], or [B, T, K]
  bool tables_by_sample = false;
  void* out = nullptr;
};

// Rows of logits. Without factors their parts are wanted, with them the gradient in the logits' place.
struct CrossEntropyArgs {
  Storage storage = Storage::float32;
  int64_t rows = 0, width = 0;
  void* logits = nullptr;
  const int64_t* columns = nullptr;  // of each row's target; negative: it is not here
  float* parts = nullptr;            // [3, rows]
  const float *tops = nullptr, *shares = nullptr, *factors = nullptr;
};

struct Kernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*transposed)(const TransposedArgs&);
  void (*swiglu)(const SwigluArgs&);
  void (*heads)(const HeadsArgs&);
  void (*cross_entropy)(const CrossEntropyArgs&);
};

// The table for this machine.
const Kernels& kernels();

// One of these is linked for every instruction set the build names (setup.py).
const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace merge_norm::cpu
