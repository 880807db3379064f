// Loads and stores of V consecutive elements of a row, as floats or as one 16-byte pack. Names: see api.h.
#pragma once

#include "api.h"
#include "portable.cuh"

namespace merge_norm {

template <typename S> constexpr int kPack = 16 / static_cast<int>(sizeof(S));

// wide: 16-byte accesses, for aligned pointers and h a multiple of V. narrow: the same elements one by one, for
// everything else; it is slower and gives the same bits.
enum class Access { wide, narrow };

template <typename S> MERGE_NORM_DEVICE void unpack(const Pack& pack, float (&value)[kPack<S>]) {
  MERGE_NORM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      value[i] = as_float(pack.word[i]);
    } else {
      const Float2 pair = widen(S{}, pack.word[i]);
      value[2 * i] = pair.low;
      value[2 * i + 1] = pair.high;
    }
  }
}

// Rounds to nearest even.
template <typename S> MERGE_NORM_DEVICE Pack pack(const float (&value)[kPack<S>]) {
  Pack result;
  MERGE_NORM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      result.word[i] = as_bits(value[i]);
    } else {
      result.word[i] = narrow(S{}, Float2{value[2 * i], value[2 * i + 1]});
    }
  }
  return result;
}

// The pack that starts at `from`, of which `count` elements exist (none if count <= 0); the others are 0.
template <Access A, typename S> MERGE_NORM_DEVICE Pack load(const S* from, int count) {
  Pack result = {{0, 0, 0, 0}};
  if constexpr (A == Access::wide) {
    if (count > 0) result = load_16_bytes(from);
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(S));
    MERGE_NORM_UNROLL
    for (int i = 0; i < kPack<S>; ++i) {
      if (i < count) result.word[i / kPerWord] |= load_bits(from + i) << (i % kPerWord * 16);
    }
  }
  return result;
}

template <Access A, typename S> MERGE_NORM_DEVICE void store(S* to, const Pack& pack, int count) {
  if constexpr (A == Access::wide) {
    if (count > 0) store_16_bytes(to, pack);
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(S));
    MERGE_NORM_UNROLL
    for (int i = 0; i < kPack<S>; ++i) {
      if (i < count) {
        const uint32_t bits = pack.word[i / kPerWord] >> (i % kPerWord * 16);
        if constexpr (sizeof(S) == 4) {
          to[i] = as_float(bits);
        } else {
          to[i] = S{static_cast<uint16_t>(bits)};
        }
      }
    }
  }
}

// V norm weights from element `index` on, stored as S or, by a flag that is the same for all threads, as fp32.
template <Access A, typename S>
MERGE_NORM_DEVICE void load_weights(const NormWeight& weight, int64_t index, int count, float (&value)[kPack<S>]) {
  if constexpr (sizeof(S) == 2) {
    if (weight.is_float) {
      MERGE_NORM_UNROLL
      for (int i = 0; i < kPack<S>; i += 4) {
        const Pack part = load<A>(static_cast<const float*>(weight.data) + index + i, count - i);
        MERGE_NORM_UNROLL
        for (int k = 0; k < 4; ++k) value[i + k] = as_float(part.word[k]);
      }
      return;
    }
  }
  unpack<S>(load<A>(static_cast<const S*>(weight.data) + index, count), value);
}

}  // namespace merge_norm
