// The three operators in plain fp64 loops, for the self-test. Names: see merge_norm/api.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../include/merge_norm/launch.cuh"

namespace merge_norm::emulation {

template <typename S> double value(S x) {
  if constexpr (sizeof(S) == 4) {
    return x;
  } else {
    return widen(S{}, x.bits).low;
  }
}

template <typename S> S rounded(double x) {
  if constexpr (sizeof(S) == 4) {
    return static_cast<float>(x);
  } else {
    return S{static_cast<uint16_t>(narrow(S{}, Float2{static_cast<float>(x), 0.0f}))};
  }
}

template <typename S> double value_at(const void* array, int64_t i) { return value(static_cast<const S*>(array)[i]); }

template <typename S> double weight_at(const NormWeight& weight, int64_t i) {
  return weight.is_float ? static_cast<const float*>(weight.data)[i] : value_at<S>(weight.data, i);
}

struct ForwardResult {
  std::vector<double> merged, normed, rstd;
};

// The norm is defined by the *rounded* merged: it starts from the one that the kernel stored, so that a sum next to a
// rounding boundary does not blur it.
template <typename S> ForwardResult reference_forward(const ForwardArgs& args) {
  ForwardResult result;
  const int64_t slab = args.rows * args.hidden, n = args.n_increments;
  for (int64_t r = 0; r < args.coefficient_rows; ++r) {
    for (int64_t i = 0; i < slab; ++i) {
      double sum = args.residual != nullptr ? value_at<S>(args.residual, i) : 0;
      for (int64_t j = 0; j < n; ++j) {
        const double c = args.coefficients != nullptr ? args.coefficients[r * n + j] : 1.0;
        sum += c * value_at<S>(args.increments[j], i);
      }
      result.merged.push_back(sum);
    }
  }
  for (int64_t row = 0; args.norm_weight.data != nullptr && row < args.rows; ++row) {
    const auto x = [&](int64_t i) { return value_at<S>(n > 0 ? args.merged : args.residual, row * args.hidden + i); };
    double squares = 0;
    for (int64_t i = 0; i < args.hidden; ++i) squares += x(i) * x(i);
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(args.hidden) + args.eps);
    result.rstd.push_back(rstd);
    for (int64_t i = 0; i < args.hidden; ++i) {
      result.normed.push_back(x(i) * rstd * weight_at<S>(args.norm_weight, i));
    }
  }
  return result;
}

struct BackwardResult {
  std::vector<double> base, norm_weight, increments, coefficients;  // increments [n, T, h]
};

template <typename S> void reference_norm_backward(const BackwardArgs& args, BackwardResult& result) {
  const int64_t h = args.hidden;
  result.norm_weight.assign(static_cast<size_t>(h), 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t start = row * h;
    const double rstd = args.rstd[row];
    double dot = 0;
    for (int64_t i = 0; i < h; ++i) {
      const double product = value_at<S>(args.grad_normed, start + i) * value_at<S>(args.merged, start + i);
      dot += weight_at<S>(args.norm_weight, i) * product;
      result.norm_weight[static_cast<size_t>(i)] += product * rstd;
    }
    for (int64_t i = 0; i < h; ++i) {
      const double direct = args.grad_merged != nullptr ? value_at<S>(args.grad_merged, start + i) : 0;
      const double through = weight_at<S>(args.norm_weight, i) * value_at<S>(args.grad_normed, start + i);
      const double pull = value_at<S>(args.merged, start + i) * rstd * rstd * rstd / static_cast<double>(h) * dot;
      result.base.push_back(direct + rstd * through - pull);
    }
  }
}

// The gradients of increments and coefficients are defined by the *rounded* G: they start from the one that the kernel
// stored, so that a G next to a rounding boundary does not blur them.
template <typename S> BackwardResult reference_backward(const BackwardArgs& args) {
  BackwardResult result;
  const int64_t slab = args.rows * args.hidden, n = args.n_increments;
  if (args.grad_norm_weight != nullptr) reference_norm_backward<S>(args, result);
  const void* base = args.grad_norm_weight != nullptr ? args.grad_base : args.grad_merged;
  const auto gradient = [&](int64_t r, int64_t i) { return value_at<S>(base, r * slab + i); };
  for (int64_t j = 0; args.grad_increments != nullptr && j < n; ++j) {
    for (int64_t i = 0; i < slab; ++i) {
      double sum = 0;
      for (int64_t r = 0; r < args.coefficient_rows; ++r) sum += args.coefficients[r * n + j] * gradient(r, i);
      result.increments.push_back(sum);
    }
  }
  for (int64_t r = 0; args.grad_coefficients != nullptr && r < args.coefficient_rows; ++r) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < slab; ++i) sum += value_at<S>(args.increments[j], i) * gradient(r, i);
      result.coefficients.push_back(sum);
    }
  }
  return result;
}

struct TransposedResult {
  std::vector<double> increment, coefficients;
};

template <typename S> TransposedResult reference_transposed(const TransposedArgs& args) {
  TransposedResult result;
  const int64_t elements = args.rows * args.hidden;
  for (int64_t i = 0; i < elements; ++i) {
    double sum = args.direct != nullptr ? value_at<S>(args.direct, i) : 0;
    for (int64_t m = 0; m < args.n_gradients; ++m) sum += args.coefficients[m] * value_at<S>(args.gradients[m], i);
    result.increment.push_back(sum);
  }
  for (int64_t m = 0; args.grad_coefficients != nullptr && m < args.n_gradients; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < elements; ++i) sum += value_at<S>(args.increment, i) * value_at<S>(args.gradients[m], i);
    result.coefficients.push_back(sum);
  }
  return result;
}

}  // namespace merge_norm::emulation
