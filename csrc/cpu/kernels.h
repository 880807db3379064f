// The CPU kernels, one table for each instruction set. Arguments are those of merge_norm/api.h, but norm weights
// are fp32 and there is no workspace.
#pragma once

#include "merge_norm/api.h"

namespace merge_norm::cpu {

struct Kernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*transposed)(const TransposedArgs&);
};

// One of these is linked for every instruction set the build names (setup.py).
const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace merge_norm::cpu
