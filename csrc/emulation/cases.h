// The calls the self-test makes: random operands of a shape, one run of an operator under a schedule, and the
// comparison with reference.h. Names: see merge_norm/api.h.
#pragma once

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "reference.h"

namespace merge_norm::emulation {

struct Case {
  int64_t rows, hidden, n, coefficient_rows;
  bool residual, coefficients, direct;  // direct: grad_merged in the backward, direct in the transposed merge
  bool norm;                            // with one coefficient row only
  bool float_weight, misaligned;

  std::string name() const {
    return "T=" + std::to_string(rows) + " h=" + std::to_string(hidden) + " n=" + std::to_string(n) +
           " R=" + std::to_string(coefficient_rows) + (residual ? " residual" : "") +
           (coefficients ? " coefficients" : "") + (direct ? " direct" : "") +
           (norm ? " norm" : "") + (float_weight ? " fp32-weight" : "") + (misaligned ? " misaligned" : "");
  }
};

// An array of exactly `count` elements that starts on a 16-byte boundary or, misaligned, one element after it.
template <typename T> class Array {
 public:
  Array() = default;
  Array(int64_t count, bool misaligned)
      : shift_(misaligned ? 1 : 0), values_(static_cast<size_t>(count) + shift_, T{}) {}
  T* data() { return values_.data() + shift_; }
  size_t size() const { return values_.size() - shift_; }
  void clear() { std::fill(values_.begin(), values_.end(), T{}); }
  T operator[](size_t i) const { return values_[i + shift_]; }

 private:
  size_t shift_ = 0;
  std::vector<T> values_;
};

using Bytes = std::vector<unsigned char>;

template <typename T> void append(Bytes& bytes, Array<T>& array) {
  const auto* first = reinterpret_cast<const unsigned char*>(array.data());
  bytes.insert(bytes.end(), first, first + array.size() * sizeof(T));
}

template <typename S> constexpr Storage kStorage = Storage::float32;
template <> inline constexpr Storage kStorage<bf16> = Storage::bfloat16;
template <> inline constexpr Storage kStorage<f16> = Storage::float16;

// Half a unit in the last place of S, relative.
template <typename S> constexpr double kRounding = 6e-8;
template <> inline constexpr double kRounding<bf16> = 1.0 / 256;
template <> inline constexpr double kRounding<f16> = 1.0 / 2048;

// All operands of a case and the outputs of the three operators.
template <typename S> struct Operands {
  Case c;
  Array<S> residual, merged_in, grad_merged, grad_normed, weight, increment;
  Array<float> weight32, coefficients, rstd_in;
  std::vector<Array<S>> increments, gradients;
  std::vector<const void*> increment_pointers, gradient_pointers;

  Array<S> merged, normed, grad_base, grad_increment;
  Array<float> rstd, grad_norm_weight, grad_coefficients, workspace;
  std::vector<Array<S>> grad_increments;
  std::vector<void*> grad_increment_pointers;

  Operands(const Case& c_, unsigned seed) : c(c_), random_(seed) {
    const int64_t slab = c.rows * c.hidden, r = c.coefficient_rows;
    residual = draw<S>(slab);
    merged_in = draw<S>(r * slab);
    grad_merged = draw<S>(r * slab);
    grad_normed = draw<S>(r * slab);
    increment = draw<S>(slab);
    weight = draw<S>(c.hidden);
    weight32 = draw<float>(c.hidden);
    coefficients = draw<float>(r * c.n);
    rstd_in = draw<float>(c.rows);
    for (int64_t j = 0; j < c.n; ++j) {
      increments.push_back(draw<S>(slab));
      gradients.push_back(draw<S>(slab));
      grad_increments.emplace_back(slab, c.misaligned);
    }
    for (auto& array : increments) increment_pointers.push_back(array.data());
    for (auto& array : gradients) gradient_pointers.push_back(array.data());
    for (auto& array : grad_increments) grad_increment_pointers.push_back(array.data());
    merged = normed = grad_base = Array<S>(r * slab, c.misaligned);
    grad_increment = Array<S>(slab, c.misaligned);
    rstd = Array<float>(c.rows, false);
    grad_norm_weight = Array<float>(c.hidden, false);
    grad_coefficients = Array<float>(r * c.n, false);
  }

  // What a kernel should write and does not stays 0.
  void clear_outputs() {
    for (auto* array : {&merged, &normed, &grad_base, &grad_increment}) array->clear();
    for (auto* array : {&rstd, &grad_norm_weight, &grad_coefficients}) array->clear();
    for (auto& array : grad_increments) array.clear();
  }

  ForwardArgs forward_args() {
    ForwardArgs args;
    args.storage = kStorage<S>;
    args.rows = c.rows;
    args.hidden = c.hidden;
    args.coefficient_rows = c.coefficient_rows;
    args.residual = c.residual || c.n == 0 ? residual.data() : nullptr;
    args.increments = increment_pointers.data();
    args.n_increments = c.n;
    args.coefficients = c.coefficients ? coefficients.data() : nullptr;
    args.norm_weight = norm_weight();
    args.eps = 1e-6f;
    args.merged = c.n > 0 ? merged.data() : nullptr;
    args.normed = c.norm ? normed.data() : nullptr;
    args.rstd = c.norm ? rstd.data() : nullptr;
    return args;
  }

  BackwardArgs backward_args() {
    BackwardArgs args;
    args.storage = kStorage<S>;
    args.rows = c.rows;
    args.hidden = c.hidden;
    args.coefficient_rows = c.coefficient_rows;
    args.grad_merged = c.direct || !c.norm ? grad_merged.data() : nullptr;
    if (c.norm) {
      args.grad_normed = grad_normed.data();
      args.merged = merged_in.data();
      args.rstd = rstd_in.data();
      args.norm_weight = norm_weight();
      args.grad_base = grad_base.data();
      args.grad_norm_weight = grad_norm_weight.data();
    }
    args.increments = increment_pointers.data();
    args.n_increments = c.n;
    args.coefficients = coefficients.data();
    args.grad_increments = c.residual ? grad_increment_pointers.data() : nullptr;
    args.grad_coefficients = c.coefficients ? grad_coefficients.data() : nullptr;
    workspace = Array<float>(workspace_floats(args), false);
    args.workspace = workspace.data();
    return args;
  }

  TransposedArgs transposed_args() {
    TransposedArgs args;
    args.storage = kStorage<S>;
    args.rows = c.rows;
    args.hidden = c.hidden;
    args.direct = c.direct ? residual.data() : nullptr;
    args.increment = c.coefficients ? increment.data() : nullptr;
    args.gradients = gradient_pointers.data();
    args.n_gradients = c.n;
    args.coefficients = coefficients.data();
    args.grad_increment = grad_increment.data();
    args.grad_coefficients = c.coefficients ? grad_coefficients.data() : nullptr;
    workspace = Array<float>(workspace_floats(args), false);
    args.workspace = workspace.data();
    return args;
  }

 private:
  std::minstd_rand random_;

  NormWeight norm_weight() {
    if (!c.norm) return {};
    const void* data = c.float_weight ? static_cast<const void*>(weight32.data()) : weight.data();
    return {data, c.float_weight};
  }

  template <typename T> Array<T> draw(int64_t count) {
    Array<T> array(count, c.misaligned);
    for (int64_t i = 0; i < count; ++i) {
      array.data()[i] = rounded<T>(static_cast<double>(random_()) / (random_.max() / 2) - 1);
    }
    return array;
  }
};

// One run; everything the operator wrote, for comparison bit by bit.
enum class Operator { forward, backward, transposed };
constexpr const char* kOperatorNames[] = {"merge_norm", "merge_norm_backward", "transposed_merge"};

template <typename S> Bytes run(Operands<S>& operands, Operator op, const Schedule& schedule) {
  Machine::instance().schedule = schedule;
  operands.clear_outputs();
  const Status status = op == Operator::forward    ? launch_forward(operands.forward_args(), nullptr)
                        : op == Operator::backward ? launch_backward(operands.backward_args(), nullptr)
                                                   : launch_transposed(operands.transposed_args(), nullptr);
  if (status != Status::ok) throw Error(message(status));
  Bytes bytes;
  for (auto* array : {&operands.merged, &operands.normed, &operands.grad_base, &operands.grad_increment}) {
    append(bytes, *array);
  }
  for (auto* array : {&operands.rstd, &operands.grad_norm_weight, &operands.grad_coefficients}) append(bytes, *array);
  for (auto& array : operands.grad_increments) append(bytes, array);
  return bytes;
}

// ---- comparison with the reference -------------------------------------------------------------------------

inline void expect_close(double actual, double expected, double relative, double absolute, const char* what) {
  const double allowed = relative * std::fabs(expected) + absolute;
  if (std::fabs(actual - expected) <= allowed) return;
  char text[160];
  std::snprintf(text, sizeof text, "%s is %.9g, expected %.9g within %.2g", what, actual, expected, allowed);
  throw Error(text);
}

template <typename T>
void expect_all_close(const Array<T>& actual, const std::vector<double>& expected, size_t first, double relative,
                      double absolute, const char* what) {
  if (first + actual.size() > expected.size()) throw Error(std::string(what) + ": the reference is shorter");
  for (size_t i = 0; i < actual.size(); ++i) {
    expect_close(value(actual[i]), expected[first + i], relative, absolute, what);
  }
}

// fp32 sums of `count` terms of size one.
inline double sum_error(int64_t count) { return 4e-7 * (2 + std::sqrt(static_cast<double>(count))); }

template <typename S> void check(Operands<S>& operands, Operator op) {
  const Case& c = operands.c;
  const double once = 1.01 * kRounding<S>, merge_error = 1e-7 * static_cast<double>(c.n + 2);
  if (op == Operator::forward) {
    const ForwardResult expected = reference_forward<S>(operands.forward_args());
    if (c.n > 0) expect_all_close(operands.merged, expected.merged, 0, once, merge_error, "merged");
    if (!c.norm) return;
    expect_all_close(operands.rstd, expected.rstd, 0, 1e-6, 0, "rstd");
    expect_all_close(operands.normed, expected.normed, 0, once + 1e-6, 1e-7, "normed");
  } else if (op == Operator::backward) {
    const BackwardResult expected = reference_backward<S>(operands.backward_args());
    if (c.norm) {
      expect_all_close(operands.grad_base, expected.base, 0, once, 1e-6, "grad_base");
      const double error = sum_error(c.rows);
      expect_all_close(operands.grad_norm_weight, expected.norm_weight, 0, 1e-6, error, "grad_norm_weight");
    }
    const size_t slab = static_cast<size_t>(c.rows * c.hidden);
    for (size_t j = 0; c.residual && j < operands.grad_increments.size(); ++j) {
      const auto& actual = operands.grad_increments[j];
      expect_all_close(actual, expected.increments, j * slab, once, merge_error, "grad_increments");
    }
    if (!c.coefficients) return;
    const double error = sum_error(c.rows * c.hidden);
    expect_all_close(operands.grad_coefficients, expected.coefficients, 0, 1e-6, error, "grad_coefficients");
  } else {
    const TransposedResult expected = reference_transposed<S>(operands.transposed_args());
    expect_all_close(operands.grad_increment, expected.increment, 0, once, merge_error, "grad_increment");
    if (!c.coefficients) return;
    for (size_t m = 0; m < static_cast<size_t>(c.n); ++m) {
      const double error = sum_error(c.rows * c.hidden);
      expect_close(operands.grad_coefficients[m], expected.coefficients[m], 1e-6, error, "grad_coefficients");
    }
  }
}

}  // namespace merge_norm::emulation
