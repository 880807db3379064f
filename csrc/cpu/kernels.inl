// The CPU kernels, compiled once per instruction set: isa_*.cpp defines MERGE_NORM_NAMESPACE and
// MERGE_NORM_TABLE and includes this file. The compiler flags of each are in setup.py.
//
// Those that merge walk through their slabs tile by tile. A tile is long enough, some kilobytes of each slab, that the
// memory system sees a few long reads and not one short read from each of dozens of slabs, and short enough that
// the sums and the row being normed stay in the first-level cache.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace merge_norm::cpu {
namespace MERGE_NORM_NAMESPACE {

#include "block.h"
#include "sums.h"
#include "forward.h"
#include "backward.h"
#include "transposed.h"
#include "pointwise.h"
#include "cross_entropy.h"

template <typename Args, void (*kFloat)(const Args&), void (*kBf16)(const Args&), void (*kHalf)(const Args&)>
void by_storage(const Args& a) {
  switch (a.storage) {
    case Storage::float32: return kFloat(a);
    case Storage::bfloat16: return kBf16(a);
    case Storage::float16: return kHalf(a);
  }
}

}  // namespace MERGE_NORM_NAMESPACE

const Kernels& MERGE_NORM_TABLE() {
  using namespace MERGE_NORM_NAMESPACE;
  using c10::BFloat16, c10::Half;
  static const Kernels table{
      by_storage<ForwardArgs, forward<float>, forward<BFloat16>, forward<Half>>,
      by_storage<BackwardArgs, backward<float>, backward<BFloat16>, backward<Half>>,
      by_storage<TransposedArgs, transposed<float>, transposed<BFloat16>, transposed<Half>>,
      by_storage<SwigluArgs, swiglu<float>, swiglu<BFloat16>, swiglu<Half>>,
      by_storage<HeadsArgs, rotated_heads<float>, rotated_heads<BFloat16>, rotated_heads<Half>>,
      by_storage<CrossEntropyArgs, cross_entropy<float>, cross_entropy<BFloat16>, cross_entropy<Half>>,
  };
  return table;
}

}  // namespace merge_norm::cpu
