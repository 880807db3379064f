// Every difference between nvcc and a plain C++ compiler. The other headers compile unchanged with both:
// with nvcc for the GPU, with g++ over csrc/emulation, which runs the same kernels on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "layout.h"
#include "storage.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MERGE_NORM_DEVICE __device__ __forceinline__
#define MERGE_NORM_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#define MERGE_NORM_PARAMS(type) const __grid_constant__ type  // stays in constant memory, indexable there
#define MERGE_NORM_SHARED(type, name, count) __shared__ type name[count]
#define MERGE_NORM_UNROLL _Pragma("unroll")
#define MERGE_NORM_NO_UNROLL _Pragma("unroll 1")

#else

#include "../../emulation/emulation.h"

#define MERGE_NORM_DEVICE inline
#define MERGE_NORM_KERNEL(max_threads) void
#define MERGE_NORM_PARAMS(type) const type
#define MERGE_NORM_SHARED(type, name, count) \
  static const char name##_key = 0;          \
  type* const name = merge_norm::emulation::shared_array<type>(&name##_key, count)
#define MERGE_NORM_UNROLL
#define MERGE_NORM_NO_UNROLL

#endif

namespace merge_norm {

// 16 bytes of any storage type, as the four registers they travel in.
struct alignas(16) Pack {
  uint32_t word[4];
};

struct Float2 {
  float low, high;
};

#if defined(__CUDACC__)

MERGE_NORM_DEVICE float* dynamic_shared() {
  extern __shared__ __align__(16) float merge_norm_dynamic_shared[];
  return merge_norm_dynamic_shared;
}

// Through the read-only path, so that the compiler may move loads across stores: inputs never alias outputs.
MERGE_NORM_DEVICE Pack load_16_bytes(const void* address) {
  const uint4 v = __ldg(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
}
// In PTX, because the compiler splits an assignment into four stores when it sees where the words come from.
MERGE_NORM_DEVICE void store_16_bytes(void* address, const Pack& pack) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(pack.word[0]), "r"(pack.word[1]),
               "r"(pack.word[2]), "r"(pack.word[3])
               : "memory");
}
MERGE_NORM_DEVICE float load_float(const float* address) { return __ldg(address); }

MERGE_NORM_DEVICE uint32_t load_bits(const float* address) { return __float_as_uint(__ldg(address)); }
template <typename S> MERGE_NORM_DEVICE uint32_t load_bits(const S* address) {
  return __ldg(reinterpret_cast<const unsigned short*>(address));
}

MERGE_NORM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MERGE_NORM_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

MERGE_NORM_DEVICE Float2 widen(f16, uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof word);
  const float2 v = __half22float2(pair);
  return {v.x, v.y};
}
MERGE_NORM_DEVICE uint32_t narrow(f16, Float2 v) {
  const __half2 pair = __floats2half2_rn(v.low, v.high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
MERGE_NORM_DEVICE uint32_t narrow(bf16, Float2 v) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v.low, v.high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <typename Params>
bool launch(void (*kernel)(const Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Params& params) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)) !=
          cudaSuccess) {
    return false;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, params) == cudaSuccess;
}

#else

inline float* dynamic_shared() { return emulation::dynamic_shared(); }

inline Pack load_16_bytes(const void* address) { return *static_cast<const Pack*>(address); }
inline void store_16_bytes(void* address, const Pack& pack) { *static_cast<Pack*>(address) = pack; }
inline float load_float(const float* address) { return *address; }

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint32_t load_bits(const float* address) { return as_bits(*address); }
template <typename S> uint32_t load_bits(const S* address) { return address->bits; }

inline Float2 widen(f16, uint32_t word) {
  return {emulation::half_to_float(static_cast<uint16_t>(word)),
          emulation::half_to_float(static_cast<uint16_t>(word >> 16))};
}
inline uint32_t narrow(f16, Float2 v) {
  return emulation::float_to_half(v.low) | uint32_t{emulation::float_to_half(v.high)} << 16;
}
inline uint32_t narrow(bf16, Float2 v) {
  return emulation::float_to_bfloat(v.low) | uint32_t{emulation::float_to_bfloat(v.high)} << 16;
}

template <typename Params>
bool launch(void (*kernel)(const Params), dim3 grid, dim3 block, size_t shared_bytes, void*,
            const Params& params) {
  emulation::run_grid(grid, block, shared_bytes, [&] { kernel(params); });
  return true;
}

#endif

MERGE_NORM_DEVICE Float2 widen(bf16, uint32_t word) {
  return {as_float(word << 16), as_float(word & 0xffff0000u)};
}

}  // namespace merge_norm
