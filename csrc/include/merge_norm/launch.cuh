// Host side: checks the limits, chooses the kernel variant and launches it. Names: see api.h.
#pragma once

#include <type_traits>
#include <vector>

#include "api.h"
#include "backward.cuh"
#include "forward.cuh"
#include "transposed.cuh"

namespace merge_norm {

template <int VALUE> using Constant = std::integral_constant<int, VALUE>;

// Whether every pointer added to it (nullptr included) can be read and written 16 bytes at a time.
class Alignment {
 public:
  Alignment& add(const void* pointer) {
    bits_ |= reinterpret_cast<uintptr_t>(pointer);
    return *this;
  }
  template <typename Pointer> Alignment& add(const Pointer* pointers, int64_t count) {
    for (int64_t i = 0; pointers != nullptr && i < count; ++i) add(pointers[i]);
    return *this;
  }
  bool wide() const { return bits_ % 16 == 0; }

 private:
  uintptr_t bits_ = 0;
};

// Calls launcher(Constant<E>, Constant<access>) with the variant for this width and alignment.
template <typename Launcher> Status with_variant(int64_t hidden, bool wide, Launcher launcher) {
  const auto with_access = [&](auto elements) {
    return wide ? launcher(elements, std::integral_constant<Access, Access::wide>{})
                : launcher(elements, std::integral_constant<Access, Access::narrow>{});
  };
  switch (row_layout(hidden).elements) {
    case 8: return with_access(Constant<8>{});
    case 16: return with_access(Constant<16>{});
    default: return with_access(Constant<32>{});
  }
}

template <typename Params>
Status launch_blocks(void (*kernel)(const Params), int64_t blocks, dim3 block, int64_t shared_floats, Stream stream,
                     const Params& params) {
  if (blocks == 0) return Status::ok;
  if (blocks > INT32_MAX) return Status::too_many_rows;
  const size_t bytes = static_cast<size_t>(shared_floats) * sizeof(float);
  const bool launched = launch(kernel, dim3(static_cast<unsigned>(blocks)), block, bytes, stream, params);
  return launched ? Status::ok : Status::launch_failed;
}

inline dim3 row_block(int64_t hidden) {
  const RowLayout layout = row_layout(hidden);
  return dim3(static_cast<unsigned>(layout.threads), static_cast<unsigned>(layout.rows));
}

inline Status finalize(const float* partials, int64_t count, int64_t width, float* sums, int64_t stride,
                       Stream stream) {
  if (width == 0) return Status::ok;
  const FinalizeParams params = {partials, count, width, sums, stride};
  return launch_blocks(finalize_kernel<kFinalizeSlices>, ceil_div(width, kFinalizeColumns),
                       dim3(kFinalizeColumns, kFinalizeSlices), 0, stream, params);
}

template <typename S> S* offset(const void* base, int64_t elements) {
  return base == nullptr ? nullptr : const_cast<S*>(static_cast<const S*>(base)) + elements;
}

// ---- forward -----------------------------------------------------------------------------------------------

template <typename S> Status launch_forward_as(const ForwardArgs& args, Stream stream) {
  ForwardParams<S> params = {};
  const bool has_residual = args.residual != nullptr;
  if (args.rows == 0) return Status::ok;
  if (!has_residual && args.n_increments == 0) return Status::nothing_to_merge;
  if (args.hidden > kMaxHidden) return Status::hidden_too_wide;
  if (args.n_increments > kMaxIncrements) return Status::too_many_increments;
  if (args.norm_weight.data != nullptr && args.coefficient_rows > 1) return Status::norm_of_coefficient_rows;
  if (has_residual) params.terms[0] = static_cast<const S*>(args.residual);
  params.first_increment = has_residual ? 1 : 0;
  params.n_terms = params.first_increment + static_cast<int>(args.n_increments);
  for (int64_t j = 0; j < args.n_increments; ++j) {
    params.terms[params.first_increment + j] = static_cast<const S*>(args.increments[j]);
  }
  params.norm_weight = args.norm_weight;
  params.eps = args.eps;
  params.hidden = static_cast<int>(args.hidden);
  params.rows = args.rows;
  params.normed = static_cast<S*>(args.normed);
  params.rstd = args.rstd;

  const bool wide = args.hidden % kPack<S> == 0 && Alignment()
                                                       .add(args.residual)
                                                       .add(args.increments, args.n_increments)
                                                       .add(args.norm_weight.data)
                                                       .add(args.merged)
                                                       .add(args.normed)
                                                       .wide();
  const int64_t blocks = ceil_div(args.rows, row_layout(args.hidden).rows);
  for (int64_t r = 0, count; r < args.coefficient_rows; r += count) {
    count = r + 1 < args.coefficient_rows ? 2 : 1;
    params.coefficients = offset<float>(args.coefficients, r * args.n_increments);
    params.merged = offset<S>(args.merged, r * args.rows * args.hidden);
    const Status status = with_variant(args.hidden, wide, [&](auto elements, auto access) {
      const auto kernel = count == 2 ? forward_kernel<S, elements, 2, access> : forward_kernel<S, elements, 1, access>;
      return launch_blocks(kernel, blocks, row_block(args.hidden), count * params.n_terms, stream, params);
    });
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

// ---- transposed merge --------------------------------------------------------------------------------------

template <typename S> Status launch_transposed_as(const TransposedArgs& args, Stream stream) {
  TransposedParams<S> params = {};
  if (args.n_gradients == 0) return Status::nothing_to_merge;
  if (args.n_gradients > kMaxIncrements) return Status::too_many_increments;
  const bool has_direct = args.direct != nullptr, want_dots = args.grad_coefficients != nullptr;
  if (has_direct) params.terms[0] = static_cast<const S*>(args.direct);
  params.first_gradient = has_direct ? 1 : 0;
  params.n_terms = params.first_gradient + static_cast<int>(args.n_gradients);
  for (int64_t m = 0; m < args.n_gradients; ++m) {
    params.terms[params.first_gradient + m] = static_cast<const S*>(args.gradients[m]);
  }
  params.coefficients = args.coefficients;
  params.coefficient_stride = args.coefficient_stride;
  params.increment = want_dots ? static_cast<const S*>(args.increment) : nullptr;
  params.grad_increment = static_cast<S*>(args.grad_increment);
  params.partials = want_dots ? args.workspace : nullptr;
  params.elements = args.rows * args.hidden;
  params.tiles_per_partial = tiles_per_partial(args.rows, args.hidden);

  const bool wide = params.elements % kPack<S> == 0 && Alignment()
                                                           .add(args.direct)
                                                           .add(args.gradients, args.n_gradients)
                                                           .add(params.increment)
                                                           .add(args.grad_increment)
                                                           .wide();
  const int64_t blocks = flat_partials(args.rows, args.hidden);
  const int64_t shared_floats = (1 + kFlatThreads / kWarp) * int64_t{params.n_terms};
  const auto kernel = wide ? transposed_kernel<S, Access::wide> : transposed_kernel<S, Access::narrow>;
  const Status status = launch_blocks(kernel, blocks, dim3(kFlatThreads), shared_floats, stream, params);
  if (status != Status::ok || !want_dots) return status;
  return finalize(args.workspace, blocks, args.n_gradients, args.grad_coefficients, args.coefficient_stride, stream);
}

// ---- backward ----------------------------------------------------------------------------------------------

// One coefficient row, or without a norm two, in one pass.
template <typename S>
Status launch_backward_rows(const BackwardArgs& args, float* weight_partials, float* coefficient_partials,
                            Stream stream) {
  BackwardParams<S> params = {};
  const bool want_dots = args.grad_coefficients != nullptr;
  params.want_increments = args.grad_increments != nullptr;
  params.n_increments = want_dots || params.want_increments ? static_cast<int>(args.n_increments) : 0;
  for (int64_t j = 0; j < params.n_increments; ++j) {
    if (want_dots) params.increments[j] = static_cast<const S*>(args.increments[j]);
    if (params.want_increments) params.grad_increments[j] = static_cast<S*>(args.grad_increments[j]);
  }
  params.grad_merged = static_cast<const S*>(args.grad_merged);
  params.grad_normed = static_cast<const S*>(args.grad_normed);
  params.merged = static_cast<const S*>(args.merged);
  params.rstd = args.rstd;
  params.norm_weight = args.norm_weight;
  params.coefficients = args.coefficients;
  params.grad_base = static_cast<S*>(args.grad_base);
  params.weight_partials = weight_partials;
  params.coefficient_partials = want_dots ? coefficient_partials : nullptr;
  params.hidden = static_cast<int>(args.hidden);
  params.rows = args.rows;
  params.rows_per_partial = rows_per_partial(args.rows, args.hidden);

  const bool wide = args.hidden % kPack<S> == 0 && Alignment()
                                                       .add(params.increments, params.n_increments)
                                                       .add(params.grad_increments, params.n_increments)
                                                       .add(args.grad_merged)
                                                       .add(args.grad_normed)
                                                       .add(args.merged)
                                                       .add(args.norm_weight.data)
                                                       .add(args.grad_base)
                                                       .add(weight_partials)
                                                       .wide();
  const dim3 block = row_block(args.hidden);
  const int64_t warps = int64_t{block.x} * block.y / kWarp, R = args.coefficient_rows;
  const int64_t blocks = ceil_div(row_partials(args.rows, args.hidden), block.y);
  return with_variant(args.hidden, wide, [&](auto elements, auto access) {
    const int64_t weight_sums = args.grad_norm_weight != nullptr ? warps * kWarp * elements.value : 0;
    return launch_blocks(R == 2 ? backward_kernel<S, elements, 2, access> : backward_kernel<S, elements, 1, access>,
                         blocks, block, weight_sums + R * (1 + warps) * params.n_increments, stream, params);
  });
}

// Any number of rows: one transposed merge per increment over their R gradients.
template <typename S>
Status launch_backward_many_rows(const BackwardArgs& args, float* coefficient_partials, Stream stream) {
  std::vector<const void*> gradients;
  for (int64_t r = 0; r < args.coefficient_rows; ++r) {
    gradients.push_back(offset<S>(args.grad_merged, r * args.rows * args.hidden));
  }
  TransposedArgs column;
  column.storage = args.storage;
  column.rows = args.rows;
  column.hidden = args.hidden;
  column.gradients = gradients.data();
  column.n_gradients = args.coefficient_rows;
  column.coefficient_stride = args.n_increments;
  column.workspace = coefficient_partials;
  const bool wanted = args.grad_increments != nullptr || args.grad_coefficients != nullptr;
  for (int64_t j = 0; wanted && j < args.n_increments; ++j) {
    column.coefficients = offset<float>(args.coefficients, j);
    column.increment = args.grad_coefficients != nullptr ? args.increments[j] : nullptr;
    column.grad_increment = args.grad_increments != nullptr ? args.grad_increments[j] : nullptr;
    column.grad_coefficients = offset<float>(args.grad_coefficients, j);
    const Status status = launch_transposed_as<S>(column, stream);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

template <typename S> Status launch_backward_as(const BackwardArgs& args, Stream stream) {
  const int64_t rows = args.coefficient_rows, partials = row_partials(args.rows, args.hidden);
  const bool has_norm = args.grad_norm_weight != nullptr;
  if (args.hidden > kMaxHidden) return Status::hidden_too_wide;
  if (args.n_increments > kMaxIncrements) return Status::too_many_increments;
  if (rows > kMaxIncrements) return Status::too_many_coefficient_rows;
  if (has_norm && rows > 1) return Status::norm_of_coefficient_rows;
  float* const weight_partials = args.workspace;
  float* const coefficient_partials = args.workspace + (has_norm ? partials * args.hidden : 0);
  if (rows > 2 || (rows == 2 && row_layout(args.hidden).threads > kBackwardThreads<2>)) {
    return launch_backward_many_rows<S>(args, coefficient_partials, stream);
  }
  Status status = launch_backward_rows<S>(args, weight_partials, coefficient_partials, stream);
  if (status == Status::ok && has_norm) {
    status = finalize(weight_partials, partials, args.hidden, args.grad_norm_weight, 1, stream);
  }
  if (status != Status::ok || args.grad_coefficients == nullptr) return status;
  return finalize(coefficient_partials, partials, rows * args.n_increments, args.grad_coefficients, 1, stream);
}

}  // namespace merge_norm
