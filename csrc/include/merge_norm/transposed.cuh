// grad_increment = direct + sum_m coefficients[m] * gradients[m] and <increment, gradients[m]>, for all m in one
// pass over the T*h elements. Names: see api.h.
#pragma once

#include "forward.cuh"

namespace merge_norm {

template <typename S> struct TransposedParams {
  const S* terms[kMaxIncrements + 1];    // direct, if any, then the gradients
  int n_terms;
  int first_gradient;                    // 1 with direct, else 0
  const float* coefficients;
  int64_t coefficient_stride;
  const S* increment;                    // used with partials
  S* grad_increment;                     // nullptr: not wanted
  float* partials;                       // [P, M]; nullptr: not wanted
  int64_t elements, tiles_per_partial;
};

// Dynamic shared memory: coefficients [n_terms], then dots [warps, n_terms]; the dots of `direct` are not stored.
template <typename S, Access A>
MERGE_NORM_KERNEL(kFlatThreads) transposed_kernel(MERGE_NORM_PARAMS(TransposedParams<S>) params) {
  constexpr int V = kPack<S>, kPacks = kFlatElements / V, kWarps = kFlatThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x), n = params.n_terms;
  float* const coefficients = dynamic_shared();
  float* const dots = coefficients + n;
  float* const warp_dots = dots + warp_in_block() * n;
  fill_coefficients(coefficients, 1, n, params.first_gradient, params.coefficients, 0, params.coefficient_stride);
  for (int i = thread; i < kWarps * n; i += kFlatThreads) dots[i] = 0;
  __syncthreads();

  const bool want_dots = params.partials != nullptr;
  for (int64_t tile = 0; tile < params.tiles_per_partial; ++tile) {
    const int64_t start = (blockIdx.x * params.tiles_per_partial + tile) * kFlatTile;
    const int64_t left = params.elements - start;
    const int in_tile = left < kFlatTile ? static_cast<int>(left > 0 ? left : 0) : static_cast<int>(kFlatTile);
    Pack increment[kPacks];
    float sums[kPacks][V];
    MERGE_NORM_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      const int offset = (p * kFlatThreads + thread) * V;
      if (want_dots) increment[p] = load<A>(params.increment + start + offset, in_tile - offset);
      MERGE_NORM_UNROLL
      for (int v = 0; v < V; ++v) sums[p][v] = -0.0f;  // see merge_pack
    }
    for (int first = 0; first < n; first += kBatch) {
      float batch_dots[kBatch] = {};
      MERGE_NORM_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        const int offset = (p * kFlatThreads + thread) * V;
        if (offset >= in_tile) continue;  // here, so that the wide loads below need no condition
        Pack batch[kBatch];
        MERGE_NORM_UNROLL
        for (int u = 0; u < kBatch; ++u) {
          if (first + u < n) batch[u] = load<A>(params.terms[first + u] + start + offset, in_tile - offset);
        }
        MERGE_NORM_UNROLL
        for (int u = 0; u < kBatch; ++u) {
          if (first + u >= n) continue;
          float g[V];
          unpack<S>(batch[u], g);
          MERGE_NORM_UNROLL
          for (int v = 0; v < V; ++v) sums[p][v] = fmaf(coefficients[first + u], g[v], sums[p][v]);
          if (want_dots) {
            float x[V];
            unpack<S>(increment[p], x);
            MERGE_NORM_UNROLL
            for (int v = 0; v < V; ++v) batch_dots[u] = fmaf(x[v], g[v], batch_dots[u]);
          }
        }
      }
      if (!want_dots) continue;
      MERGE_NORM_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (first + u >= n) continue;
        const float sum = warp_sum(batch_dots[u]);
        if (lane_in_warp() == 0) warp_dots[first + u] += sum;
      }
    }
    if (params.grad_increment == nullptr) continue;
    MERGE_NORM_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      const int offset = (p * kFlatThreads + thread) * V;
      store<A>(params.grad_increment + start + offset, pack<S>(sums[p]), in_tile - offset);
    }
  }

  if (!want_dots) return;
  __syncthreads();
  const int m_count = n - params.first_gradient;
  MERGE_NORM_NO_UNROLL
  for (int m = thread; m < m_count; m += kFlatThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += dots[w * n + m + params.first_gradient];
    params.partials[int64_t{blockIdx.x} * m_count + m] = sum;
  }
}

}  // namespace merge_norm
