// Sums over the threads of a warp, of a row, and over partial sums; always in the same order. Names: see api.h.
#pragma once

#include "portable.cuh"

namespace merge_norm {

MERGE_NORM_DEVICE int warp_in_block() {
  return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) / kWarp;
}
MERGE_NORM_DEVICE int lane_in_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Every lane gets the sum. blockDim.x is a multiple of 32 in all kernels, so that warps are full.
MERGE_NORM_DEVICE float warp_sum(float value) {
  MERGE_NORM_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over the threads of a row (those of one threadIdx.y); every thread gets it. `scratch` holds kMaxWarps floats.
// One barrier: whoever calls this in a loop alternates between two scratch arrays, so that a fast warp does not
// overwrite what a slow one still reads.
MERGE_NORM_DEVICE float row_sum(float value, float* scratch) {
  value = warp_sum(value);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return value;
  if (lane_in_warp() == 0) scratch[warp_in_block()] = value;
  __syncthreads();
  const float* row = scratch + static_cast<int>(threadIdx.y) * warps;
  value = row[0];
  for (int w = 1; w < warps; ++w) value += row[w];
  return value;
}

// sums[c * stride] = sum_p partials[p * width + c], p = 0 .. count - 1.
struct FinalizeParams {
  const float* partials;
  int64_t count, width;
  float* sums;
  int64_t stride;
};

constexpr int kFinalizeColumns = 32, kFinalizeSlices = 16;

// Block (32, 16): a thread adds every 16th partial of its column, then the 16 slices are added in order.
template <int SLICES> MERGE_NORM_KERNEL(kMaxThreads) finalize_kernel(MERGE_NORM_PARAMS(FinalizeParams) params) {
  MERGE_NORM_SHARED(float, slices, SLICES * kFinalizeColumns);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int64_t column = int64_t{blockIdx.x} * kFinalizeColumns + x;
  float sum = 0;
  if (column < params.width) {
    for (int64_t p = y; p < params.count; p += SLICES) sum += load_float(params.partials + p * params.width + column);
  }
  slices[y * kFinalizeColumns + x] = sum;
  __syncthreads();
  if (y == 0 && column < params.width) {
    for (int slice = 1; slice < SLICES; ++slice) sum += slices[slice * kFinalizeColumns + x];
    params.sums[column * params.stride] = sum;
  }
}

}  // namespace merge_norm
