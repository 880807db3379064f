// Storage types. The 16-bit ones are bit patterns here; conversions are in portable.cuh.
#pragma once

#include <cstdint>

namespace merge_norm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Storage : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace merge_norm
