// The operators on CPU tensors, and the choice of instruction set.
#include <ATen/Version.h>
#include <torch/library.h>

#include "../operators.h"
#include "kernels.h"

namespace merge_norm::cpu {

// torch's own choice, which ATEN_CPU_CAPABILITY=default|avx2 lowers.
const Kernels& kernels() {
#ifdef MERGE_NORM_X86
  static const Kernels& chosen = []() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512();
    if (capability == "AVX2") return kernels_avx2();
    return kernels_default();
  }();
  return chosen;
#else
  return kernels_default();
#endif
}

namespace {

struct Cpu {
  static constexpr bool kFloatWeights = true;
  static void check_limits(int64_t, int64_t, const char*) {}
  static void forward(const ForwardArgs& args, const Tensor&) { kernels().forward(args); }
  static void backward(const BackwardArgs& args, const Tensor&) { kernels().backward(args); }
  static void transposed(const TransposedArgs& args, const Tensor&) { kernels().transposed(args); }
};

}  // namespace
}  // namespace merge_norm::cpu

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) {
  using merge_norm::cpu::Cpu;
  m.impl("merge_norm", merge_norm::merge_norm<Cpu>);
  m.impl("merge_norm_backward", merge_norm::merge_norm_backward<Cpu>);
  m.impl("transposed_merge", merge_norm::transposed_merge<Cpu>);
}
