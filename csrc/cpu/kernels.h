// The CPU kernels as functions of raw pointers, one table for each instruction set.
//
// T rows of h elements, all slabs contiguous; R coefficient rows, k increments. S is the storage type; whatever
// is not S is fp32. What each kernel computes is written in csrc/schema.cpp.
#pragma once

#include <cstdint>

namespace merge_norm::cpu {

enum class Storage { kFloat, kBFloat16, kHalf };

struct ForwardArgs {
  Storage storage;
  int64_t T, h, R, k;
  const void* residual;            // [T, h] or null
  const void* const* increments;   // k pointers to [T, h]
  const float* coefficients;       // [R, k]
  const float* norm_weight;        // [h], [R, h] or null
  bool weight_per_row;             // norm_weight is [R, h]
  float eps;
  void* merged;                    // [R, T, h]; null if k = 0, where the residual itself is normed
  void* normed;                    // [R, T, h] or null
  float* rstd;                     // [R, T] or null
};

struct BackwardArgs {
  Storage storage;
  int64_t T, h, R, k;
  const void* grad_merged;         // [R, T, h] or null
  const void* grad_normed;         // [R, T, h] or null: then grad_merged is the gradient of the base
  const void* merged;              // [R, T, h], as rstd and norm_weight only where there is grad_normed
  const float* rstd;               // [R, T]
  const float* norm_weight;        // [h] or [R, h]
  bool weight_per_row;
  const void* const* increments;   // k pointers to [T, h]
  const float* coefficients;       // [R, k]
  void* grad_base;                 // [R, T, h] or null
  float* grad_norm_weight;         // [h], [R, h] or null
  void* const* grad_increments;    // k pointers to [T, h], or null if not wanted
  float* grad_coefficients;        // [R, k], or null if not wanted
};

struct TransposedArgs {
  Storage storage;
  int64_t size, M;                 // elements of a slab, gradients
  const void* direct;              // [size] or null
  const void* increment;           // [size]; read only where grad_coefficients is wanted
  const void* const* gradients;    // M pointers to [size]
  const float* coefficients;       // [M]
  void* grad_increment;            // [size]
  float* grad_coefficients;        // [M], or null if not wanted
};

struct Kernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*transposed)(const TransposedArgs&);
};

// One of these is linked for every instruction set the build names (setup.py).
const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace merge_norm::cpu
