// Host interface of the fused merge-and-norm kernels: plain pointers, no torch, no CUDA headers.
//
// The CUDA binding and the CPU emulation call the same functions. Pointers are device pointers under CUDA and
// host pointers under emulation; pointer *tables* and the structs themselves are always on the host.
//
// Names used in all files of this folder:
//   S     storage type: float, bf16 or f16. Arithmetic, coefficients and statistics are fp32.
//   T     rows: the product of the leading dimensions      h  hidden: length of a row
//   n     number of increments (the history)               R  coefficient rows over one history
//   M     number of gradients in a transposed merge        P  number of partial sums, from (T, h) only
//   V     elements of S in 16 bytes (a pack)               E  elements of a row that one thread holds
// Contiguous arrays: a row operand is [T, h], an operand per coefficient row [R, T, h], rstd [T]. A norm takes R = 1.
#pragma once

#include <cstdint>

#include "layout.h"
#include "storage.h"

namespace merge_norm {

using Stream = void*;  // a cudaStream_t; ignored by the emulation

enum class Status {
  ok,
  nothing_to_merge,          // neither residual nor increments (or no gradients)
  hidden_too_wide,           // h > kMaxHidden
  too_many_increments,       // n or M > kMaxIncrements
  too_many_coefficient_rows, // R > kMaxIncrements in the backward pass
  norm_of_coefficient_rows,  // a norm with R > 1
  too_many_rows,             // T needs more blocks than a grid can have
  launch_failed,             // the CUDA runtime knows more: cudaGetLastError
};

inline const char* message(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::nothing_to_merge: return "there is nothing to merge";
    case Status::hidden_too_wide: return "the last dimension is above 16384";
    case Status::too_many_increments: return "there are more than 128 increments or gradients";
    case Status::too_many_coefficient_rows: return "there are more than 128 coefficient rows";
    case Status::norm_of_coefficient_rows: return "a norm is of one merge, not of several coefficient rows";
    case Status::too_many_rows: return "there are too many rows for one launch";
    case Status::launch_failed: return "the kernel could not be launched";
  }
  return "unknown status";
}

struct NormWeight {
  const void* data = nullptr;  // nullptr: no norm
  bool is_float = false;       // fp32, else S
};

// merged[r] = round(residual + sum_j coefficients[r, j] * increments[j]); normed, rstd: RMSNorm of the rounded (R = 1).
struct ForwardArgs {
  Storage storage = Storage::float32;
  int64_t rows = 0, hidden = 0;
  int64_t coefficient_rows = 1;
  const void* residual = nullptr;                 // nullptr: the merge starts from zero
  const void* const* increments = nullptr;        // n pointers
  int64_t n_increments = 0;
  const float* coefficients = nullptr;            // [R, n]; nullptr: all ones
  NormWeight norm_weight;
  float eps = 0;
  void* merged = nullptr;                         // nullptr: not stored
  void* normed = nullptr;                         // with norm_weight
  float* rstd = nullptr;                          // with norm_weight
};

// G[r] = round(grad_merged[r] + gradient through the norm (R = 1)); then, of the rounded G,
// grad_increments[j] = round(sum_r coefficients[r, j] * G[r]) and grad_coefficients[r, j] = <increments[j], G[r]>.
struct BackwardArgs {
  Storage storage = Storage::float32;
  int64_t rows = 0, hidden = 0;
  int64_t coefficient_rows = 1;
  const void* grad_merged = nullptr;              // nullptr: zeros
  const void* grad_normed = nullptr;              // nullptr: no norm, G is grad_merged
  const void* merged = nullptr;                   // with grad_normed, like rstd and norm_weight
  const float* rstd = nullptr;
  NormWeight norm_weight;
  const void* const* increments = nullptr;        // read for grad_coefficients only
  int64_t n_increments = 0;
  const float* coefficients = nullptr;            // [R, n]; read for grad_increments only
  void* grad_base = nullptr;                      // G; with grad_normed
  float* grad_norm_weight = nullptr;              // [h]; if and only if there is a norm
  void* const* grad_increments = nullptr;         // n pointers; nullptr: not wanted
  float* grad_coefficients = nullptr;             // [R, n]; nullptr: not wanted
  float* workspace = nullptr;                     // workspace_floats(args) numbers
};

// grad_increment = round(direct + sum_m coefficients[m] * gradients[m]);
// grad_coefficients[m] = <increment, gradients[m]>.
struct TransposedArgs {
  Storage storage = Storage::float32;
  int64_t rows = 0, hidden = 0;
  const void* direct = nullptr;                   // nullptr: zeros
  const void* increment = nullptr;                // read for grad_coefficients only
  const void* const* gradients = nullptr;         // M pointers
  int64_t n_gradients = 0;
  const float* coefficients = nullptr;            // [M], coefficient_stride apart
  int64_t coefficient_stride = 1;
  void* grad_increment = nullptr;                 // nullptr: not wanted
  float* grad_coefficients = nullptr;             // [M], coefficient_stride apart; nullptr: not wanted
  float* workspace = nullptr;                     // workspace_floats(args) numbers
};

// Numbers of fp32 scratch a call needs; a function of the shapes only.
inline int64_t workspace_floats(const BackwardArgs& args) {
  const int64_t rows = row_partials(args.rows, args.hidden), r = args.coefficient_rows;
  const int64_t weights = args.grad_norm_weight != nullptr ? rows * args.hidden : 0;
  if (args.grad_coefficients == nullptr) return weights;
  const int64_t flat = flat_partials(args.rows, args.hidden);
  return weights + (rows > flat ? rows : flat) * r * args.n_increments;
}

inline int64_t workspace_floats(const TransposedArgs& args) {
  return args.grad_coefficients != nullptr ? flat_partials(args.rows, args.hidden) * args.n_gradients : 0;
}

// Defined in launch.cuh and instantiated once per storage type, each in a file of its own.
template <typename S> Status launch_forward_as(const ForwardArgs& args, Stream stream);
template <typename S> Status launch_backward_as(const BackwardArgs& args, Stream stream);
template <typename S> Status launch_transposed_as(const TransposedArgs& args, Stream stream);
extern template Status launch_forward_as<float>(const ForwardArgs&, Stream);
extern template Status launch_forward_as<bf16>(const ForwardArgs&, Stream);
extern template Status launch_forward_as<f16>(const ForwardArgs&, Stream);
extern template Status launch_backward_as<float>(const BackwardArgs&, Stream);
extern template Status launch_backward_as<bf16>(const BackwardArgs&, Stream);
extern template Status launch_backward_as<f16>(const BackwardArgs&, Stream);
extern template Status launch_transposed_as<float>(const TransposedArgs&, Stream);
extern template Status launch_transposed_as<bf16>(const TransposedArgs&, Stream);
extern template Status launch_transposed_as<f16>(const TransposedArgs&, Stream);

// Each launches on `stream` and returns at once. With T = 0 nothing is read and gradients of parameters are 0.
inline Status launch_forward(const ForwardArgs& args, Stream stream) {
  switch (args.storage) {
    case Storage::bfloat16: return launch_forward_as<bf16>(args, stream);
    case Storage::float16: return launch_forward_as<f16>(args, stream);
    default: return launch_forward_as<float>(args, stream);
  }
}

inline Status launch_backward(const BackwardArgs& args, Stream stream) {
  switch (args.storage) {
    case Storage::bfloat16: return launch_backward_as<bf16>(args, stream);
    case Storage::float16: return launch_backward_as<f16>(args, stream);
    default: return launch_backward_as<float>(args, stream);
  }
}

inline Status launch_transposed(const TransposedArgs& args, Stream stream) {
  switch (args.storage) {
    case Storage::bfloat16: return launch_transposed_as<bf16>(args, stream);
    case Storage::float16: return launch_transposed_as<f16>(args, stream);
    default: return launch_transposed_as<float>(args, stream);
  }
}

}  // namespace merge_norm
