// Backward of the merge and its norm in one pass: the gradient G of merged stays in registers while the increments
// are read and their gradients written. One coefficient row, or without a norm two. Names: see api.h.
#pragma once

#include "forward.cuh"

namespace merge_norm {

template <typename S> struct BackwardParams {
  const S* increments[kMaxIncrements];   // used with coefficient_partials
  S* grad_increments[kMaxIncrements];    // used with want_increments
  int n_increments;
  bool want_increments;
  const S* grad_merged;                  // nullptr: zeros
  const S* grad_normed;                  // nullptr: no norm; G is grad_merged. With R = 1 only
  const S* merged;
  const float* rstd;
  NormWeight norm_weight;
  const float* coefficients;             // [R, n]
  S* grad_base;
  float* weight_partials;                // [P, h]
  float* coefficient_partials;           // [P, R, n]; nullptr: not wanted
  int hidden;
  int64_t rows, rows_per_partial;
};

// Each thread's own running sums, kept in shared memory because a wide row leaves no registers for them: E floats,
// four at a time so that the threads of a warp meet no bank conflict.
struct WeightSums {
  float* shared;

  MERGE_NORM_DEVICE Pack* quad(int i) const {
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    return reinterpret_cast<Pack*>(shared) + i * threads + thread;
  }
};

// G of a row through the norm: grad_merged + rstd * w * grad_normed - merged * rstd^3 / h * <w * grad_normed, merged>.
// Stores it, returns it rounded, and adds grad_normed * merged * rstd to the weight sums.
template <typename S, int E, Access A>
MERGE_NORM_DEVICE void norm_backward(const BackwardParams<S>& params, const RowPart<S, E>& part, float* scratch,
                                     const WeightSums& weight_sums, Pack (&gradient)[E / kPack<S>]) {
  constexpr int V = kPack<S>, kPacks = E / V;
  Pack merged[kPacks];
  float dot = 0;
  MERGE_NORM_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t index = part.index + part.offset(p);
    const int count = part.count - part.offset(p);
    // A branch, not predicated loads: without it the compiler moves the loads of all packs to the front, for which
    // there are not enough registers.
    if (count <= 0) continue;
    gradient[p] = load<A>(params.grad_normed + index, count);
    merged[p] = load<A>(params.merged + index, count);
    float g[V], x[V], weight[V];
    unpack<S>(gradient[p], g);
    unpack<S>(merged[p], x);
    load_weights<A, S>(params.norm_weight, part.column + part.offset(p), count, weight);
    MERGE_NORM_UNROLL
    for (int v = 0; v < V; ++v) dot = fmaf(weight[v] * g[v], x[v], dot);
  }
  dot = row_sum(dot, scratch);
  const float rstd = part.count > 0 ? load_float(params.rstd + part.row) : 0.0f;
  const float pull = -(rstd * rstd * rstd) * dot / static_cast<float>(params.hidden);
  MERGE_NORM_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t index = part.index + part.offset(p);
    const int count = part.count - part.offset(p);
    if (count <= 0) continue;
    float g[V], x[V], weight[V], sum[V];
    unpack<S>(gradient[p], g);
    unpack<S>(merged[p], x);
    load_weights<A, S>(params.norm_weight, part.column + part.offset(p), count, weight);
    Pack direct = {{0, 0, 0, 0}};
    if (params.grad_merged != nullptr) direct = load<A>(params.grad_merged + index, count);
    unpack<S>(direct, sum);
    MERGE_NORM_UNROLL
    for (int q = 0; q < V / 4; ++q) {
      Pack* const quad = weight_sums.quad(p * (V / 4) + q);
      float total[4];
      unpack<float>(*quad, total);
      MERGE_NORM_UNROLL
      for (int i = 0; i < 4; ++i) total[i] = fmaf(g[4 * q + i] * x[4 * q + i], rstd, total[i]);
      *quad = pack<float>(total);
    }
    MERGE_NORM_UNROLL
    for (int v = 0; v < V; ++v) {
      sum[v] = fmaf(x[v], pull, fmaf(rstd, weight[v] * g[v], sum[v]));
      // What does not exist must not add 0 * inf to a coefficient's gradient.
      if (A == Access::narrow && v >= count) sum[v] = 0;
    }
    gradient[p] = pack<S>(sum);
    store<A>(params.grad_base + index, gradient[p], count);
  }
}

// Gradients of the increments and, added to this warp's `dots` [R, n], of the coefficients, for one row.
template <typename S, int E, int R, Access A>
MERGE_NORM_DEVICE void increments_backward(const BackwardParams<S>& params, const RowPart<S, E>& part,
                                           const Pack (&gradient)[R][E / kPack<S>], const float* coefficients,
                                           float* dots) {
  constexpr int V = kPack<S>, kPacks = E / V;
  const int n = params.n_increments;
  const bool want_dots = params.coefficient_partials != nullptr;
  for (int first = 0; first < n; first += kBatch) {
    float sums[R][kBatch] = {};
    MERGE_NORM_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      const int64_t index = part.index + part.offset(p);
      const int count = part.count - part.offset(p);
      if (count <= 0) continue;
      Pack batch[kBatch];
      MERGE_NORM_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (want_dots && first + u < n) batch[u] = load<A>(params.increments[first + u] + index, count);
      }
      float g[R][V];
      MERGE_NORM_UNROLL
      for (int r = 0; r < R; ++r) unpack<S>(gradient[r][p], g[r]);
      MERGE_NORM_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (first + u >= n) continue;
        if (want_dots) {
          float x[V];
          unpack<S>(batch[u], x);
          MERGE_NORM_UNROLL
          for (int r = 0; r < R; ++r) {
            MERGE_NORM_UNROLL
            for (int v = 0; v < V; ++v) sums[r][u] = fmaf(x[v], g[r][v], sums[r][u]);
          }
        }
        if (params.want_increments) {
          float sum[V];
          MERGE_NORM_UNROLL
          for (int v = 0; v < V; ++v) {
            sum[v] = coefficients[first + u] * g[0][v];
            if constexpr (R == 2) sum[v] = fmaf(coefficients[n + first + u], g[1][v], sum[v]);
          }
          store<A>(params.grad_increments[first + u] + index, pack<S>(sum), count);
        }
      }
    }
    if (!want_dots) continue;
    MERGE_NORM_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      if (first + u >= n) continue;
      MERGE_NORM_UNROLL
      for (int r = 0; r < R; ++r) {
        const float sum = warp_sum(sums[r][u]);
        if (lane_in_warp() == 0) dots[r * n + first + u] += sum;
      }
    }
  }
}

// Two rows of gradients need more registers than 512 threads have; the host limits R = 2 to 256 threads.
template <int R> constexpr int kBackwardThreads = R == 1 ? kMaxThreads : kMaxThreads / 2;

// Block (threads of a row, rows): every (block, threadIdx.y) owns rows_per_partial consecutive rows and one partial
// sum. Dynamic shared memory: with a norm, weight sums [threads of the block, E]; coefficients [R, n]; then dots
// [warps of the block, R, n].
template <typename S, int E, int R, Access A>
MERGE_NORM_KERNEL(kBackwardThreads<R>) backward_kernel(MERGE_NORM_PARAMS(BackwardParams<S>) params) {
  constexpr int V = kPack<S>, kPacks = E / V;
  MERGE_NORM_SHARED(float, scratch, 2 * kMaxWarps);
  const int n = params.n_increments, width = R * n;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const bool has_norm = R == 1 && params.grad_normed != nullptr;
  const WeightSums weight_sums = {dynamic_shared()};
  float* const coefficients = weight_sums.shared + (has_norm ? threads * E : 0);
  float* const dots = coefficients + width;
  for (int i = 0; has_norm && i < E / 4; ++i) *weight_sums.quad(i) = {{0, 0, 0, 0}};
  if (params.want_increments) fill_coefficients(coefficients, R, n, 0, params.coefficients, n, 1);
  for (int i = thread; i < threads / kWarp * width; i += threads) dots[i] = 0;
  __syncthreads();

  const int64_t partial = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t first_row = partial * params.rows_per_partial;
  for (int64_t i = 0; i < params.rows_per_partial; ++i) {
    const RowPart<S, E> part(first_row + i, params.rows, params.hidden);
    Pack gradient[R][kPacks];
    if (has_norm) {
      norm_backward<S, E, A>(params, part, scratch + (i % 2) * kMaxWarps, weight_sums, gradient[0]);
    } else {
      MERGE_NORM_UNROLL
      for (int r = 0; r < R; ++r) {
        const S* const from = params.grad_merged + r * params.rows * params.hidden + part.index;
        MERGE_NORM_UNROLL
        for (int p = 0; p < kPacks; ++p) {
          gradient[r][p] = load<A>(from + part.offset(p), part.count - part.offset(p));
        }
      }
    }
    increments_backward<S, E, R, A>(params, part, gradient, coefficients, dots + warp_in_block() * width);
  }

  const RowPart<S, E> part(first_row, params.rows, params.hidden);
  if (has_norm) {
    MERGE_NORM_UNROLL
    for (int i = 0; i < E / 4; ++i) {
      const int offset = part.offset(i / (V / 4)) + i % (V / 4) * 4;
      float* const to = params.weight_partials + partial * params.hidden + part.column + offset;
      store<A>(to, *weight_sums.quad(i), part.count - offset);
    }
  }
  if (params.coefficient_partials == nullptr) return;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarp, first_warp = static_cast<int>(threadIdx.y) * warps;
  MERGE_NORM_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); first_row < params.rows && i < width; i += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int w = first_warp; w < first_warp + warps; ++w) sum += dots[w * width + i];
    params.coefficient_partials[partial * width + i] = sum;
  }
}

}  // namespace merge_norm
