// The host interface (merge_norm/api.h) on the emulator as C functions, for ctypes: see tests/ops/emulator.py.
//
// Pointers are to contiguous CPU arrays and may be null where api.h says so. Every function returns null, or a
// message that stays valid until the next call: a limit, or what the emulator found wrong.
#include <exception>
#include <string>
#include <vector>

#include "instances.h"

namespace {

using namespace merge_norm;

template <typename Call> const char* guarded(Call call) {
  static std::string problem;
  try {
    const Status status = call();
    problem = status == Status::ok ? "" : message(status);
  } catch (const std::exception& error) {
    problem = std::string("emulator: ") + error.what();
  }
  return problem.empty() ? nullptr : problem.c_str();
}

}  // namespace

extern "C" {

// How the following calls run; order is 0 forward, 1 reverse or 2 shuffled by `seed`.
void emulated_schedule(int order, uint64_t seed) {
  emulation::Machine::instance().schedule = {static_cast<emulation::Order>(order), seed, {}};
}

const char* emulated_forward(int storage, int64_t rows, int64_t hidden, int64_t coefficient_rows,
                             const void* residual, const void* const* increments, int64_t n_increments,
                             const float* coefficients, const void* norm_weight, bool weight_is_float, float eps,
                             void* merged, void* normed, float* rstd) {
  ForwardArgs args;
  args.storage = static_cast<Storage>(storage);
  args.rows = rows;
  args.hidden = hidden;
  args.coefficient_rows = coefficient_rows;
  args.residual = residual;
  args.increments = increments;
  args.n_increments = n_increments;
  args.coefficients = coefficients;
  args.norm_weight = {norm_weight, weight_is_float};
  args.eps = eps;
  args.merged = merged;
  args.normed = normed;
  args.rstd = rstd;
  return guarded([&] { return launch_forward(args, nullptr); });
}

const char* emulated_backward(int storage, int64_t rows, int64_t hidden, int64_t coefficient_rows,
                              const void* grad_merged, const void* grad_normed, const void* merged,
                              const float* rstd, const void* norm_weight, bool weight_is_float,
                              const void* const* increments, int64_t n_increments, const float* coefficients,
                              void* grad_base, float* grad_norm_weight, void* const* grad_increments,
                              float* grad_coefficients) {
  BackwardArgs args;
  args.storage = static_cast<Storage>(storage);
  args.rows = rows;
  args.hidden = hidden;
  args.coefficient_rows = coefficient_rows;
  args.grad_merged = grad_merged;
  args.grad_normed = grad_normed;
  args.merged = merged;
  args.rstd = rstd;
  args.norm_weight = {norm_weight, weight_is_float};
  args.increments = increments;
  args.n_increments = n_increments;
  args.coefficients = coefficients;
  args.grad_base = grad_base;
  args.grad_norm_weight = grad_norm_weight;
  args.grad_increments = grad_increments;
  args.grad_coefficients = grad_coefficients;
  std::vector<float> workspace(static_cast<size_t>(workspace_floats(args)));
  args.workspace = workspace.data();
  return guarded([&] { return launch_backward(args, nullptr); });
}

const char* emulated_transposed(int storage, int64_t rows, int64_t hidden, const void* direct, const void* increment,
                                const void* const* gradients, int64_t n_gradients, const float* coefficients,
                                void* grad_increment, float* grad_coefficients) {
  TransposedArgs args;
  args.storage = static_cast<Storage>(storage);
  args.rows = rows;
  args.hidden = hidden;
  args.direct = direct;
  args.increment = increment;
  args.gradients = gradients;
  args.n_gradients = n_gradients;
  args.coefficients = coefficients;
  args.grad_increment = grad_increment;
  args.grad_coefficients = grad_coefficients;
  std::vector<float> workspace(static_cast<size_t>(workspace_floats(args)));
  args.workspace = workspace.data();
  return guarded([&] { return launch_transposed(args, nullptr); });
}

}  // extern "C"
