// merged = residual + sum_j coefficients[j] * increments[j] and the RMSNorm of the rounded merged; or, without a norm,
// the merges of two coefficient rows in one reading of the history. Names: see api.h.
#pragma once

#include "pack.cuh"
#include "reduce.cuh"

namespace merge_norm {

// The residual is term 0 with coefficient 1: one loop loads all terms, with kBatch loads in flight from the first.
template <typename S> struct ForwardParams {
  const S* terms[kMaxIncrements + 1];
  int n_terms;
  int first_increment;               // 1 with a residual, else 0
  const float* coefficients;         // [R, n]; nullptr: all ones
  NormWeight norm_weight;            // data == nullptr: no norm; with R = 1 only
  float eps;
  int hidden;
  int64_t rows;
  S* merged;                         // nullptr: not stored
  S* normed;
  float* rstd;
};

// The part of a row that one thread holds. Each warp has E * 32 consecutive elements: thus the packs of a thread lie
// at fixed distances, addresses need no registers of their own, and every load of a warp is 512 consecutive bytes.
template <typename S, int E> struct RowPart {
  static constexpr int V = kPack<S>, kPacks = E / V;
  int64_t row, index;  // of the row, and of the part's first element in a [T, h] array
  int column, count;   // of the first element, and how many elements exist from there on; <= 0: none

  // Threads of a row that does not exist read and write nothing, but reach every barrier.
  MERGE_NORM_DEVICE RowPart(int64_t row_, int64_t rows, int hidden) : row(row_) {
    const int x = static_cast<int>(threadIdx.x);
    column = x / kWarp * (kWarp * E) + x % kWarp * V;
    count = row < rows ? hidden - column : 0;
    index = row * hidden + column;
  }
  MERGE_NORM_DEVICE static constexpr int offset(int p) { return p * kWarp * V; }  // of pack p from the first
};

// coefficients[r, t] of all terms in shared memory: 1 for the terms before the first increment.
MERGE_NORM_DEVICE void fill_coefficients(float* shared, int rows, int n_terms, int first, const float* values,
                                         int64_t row_stride, int64_t stride) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  MERGE_NORM_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < rows * n_terms; i += threads) {
    const int r = i / n_terms, t = i % n_terms;
    const bool given = t >= first && values != nullptr;
    shared[i] = given ? load_float(values + r * row_stride + (t - first) * stride) : 1.0f;
  }
}

// sums[r] = sum_t coefficients[r, t] * terms[t], in the order of t, for one pack at `index` of every term.
// Starting from -0 makes "1 * x + start" exactly x, zeros with their sign included.
template <typename S, Access A, int R>
MERGE_NORM_DEVICE void merge_pack(const S* const* terms, int n_terms, const float* coefficients, int64_t index,
                                  int count, float (&sums)[R][kPack<S>]) {
  MERGE_NORM_UNROLL
  for (int r = 0; r < R; ++r) {
    MERGE_NORM_UNROLL
    for (int v = 0; v < kPack<S>; ++v) sums[r][v] = -0.0f;
  }
  if (count <= 0) return;  // here, so that the wide loads below need no condition
  for (int first = 0; first < n_terms; first += kBatch) {
    Pack batch[kBatch];
    MERGE_NORM_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      if (first + u < n_terms) batch[u] = load<A>(terms[first + u] + index, count);
    }
    MERGE_NORM_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      if (first + u < n_terms) {
        float x[kPack<S>];
        unpack<S>(batch[u], x);
        MERGE_NORM_UNROLL
        for (int r = 0; r < R; ++r) {
          const float coefficient = coefficients[r * n_terms + first + u];
          MERGE_NORM_UNROLL
          for (int v = 0; v < kPack<S>; ++v) sums[r][v] = fmaf(coefficient, x[v], sums[r][v]);
        }
      }
    }
  }
}

// Block (threads of a row, rows); dynamic shared memory: R * n_terms floats.
template <typename S, int E, int R, Access A>
MERGE_NORM_KERNEL(kMaxThreads) forward_kernel(MERGE_NORM_PARAMS(ForwardParams<S>) params) {
  constexpr int V = kPack<S>, kPacks = E / V;
  MERGE_NORM_SHARED(float, scratch, kMaxWarps);
  float* const coefficients = dynamic_shared();
  fill_coefficients(coefficients, R, params.n_terms, params.first_increment, params.coefficients,
                    params.n_terms - params.first_increment, 1);
  __syncthreads();

  const int64_t slab = params.rows * params.hidden;
  const RowPart<S, E> part(int64_t{blockIdx.x} * blockDim.y + threadIdx.y, params.rows, params.hidden);
  Pack merged[kPacks];  // kept for the norm, like the next
  float square_sum = 0;
  MERGE_NORM_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t index = part.index + part.offset(p);
    const int count = part.count - part.offset(p);
    float sums[R][V];
    merge_pack<S, A, R>(params.terms, params.n_terms, coefficients, index, count, sums);
    MERGE_NORM_UNROLL
    for (int r = 0; r < R; ++r) {
      const Pack rounded = pack<S>(sums[r]);
      if (params.merged != nullptr) store<A>(params.merged + r * slab + index, rounded, count);
      if constexpr (R == 1) {
        merged[p] = rounded;
        float x[V];
        unpack<S>(rounded, x);
        MERGE_NORM_UNROLL
        for (int v = 0; v < V; ++v) {
          if (v < count) square_sum = fmaf(x[v], x[v], square_sum);
        }
      }
    }
  }
  if (R > 1 || params.norm_weight.data == nullptr) return;

  const float rstd = 1.0f / sqrtf(row_sum(square_sum, scratch) / static_cast<float>(params.hidden) + params.eps);
  if (part.count > 0 && threadIdx.x == 0) params.rstd[part.row] = rstd;
  MERGE_NORM_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int count = part.count - part.offset(p);
    float x[V], weight[V];
    unpack<S>(merged[p], x);
    load_weights<A, S>(params.norm_weight, part.column + part.offset(p), count, weight);
    MERGE_NORM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = x[v] * rstd * weight[v];
    store<A>(params.normed + part.index + part.offset(p), pack<S>(x), count);
  }
}

}  // namespace merge_norm
