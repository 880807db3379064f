// The operators on CUDA tensors: limits, scratch memory, and the launch on torch's stream. The only file that needs
// both torch and CUDA.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../operators.h"

namespace merge_norm::cuda {
namespace {

void check_launched(Status status) {
  if (status == Status::launch_failed) C10_CUDA_CHECK(cudaGetLastError());
  TORCH_CHECK(status == Status::ok, "merge_norm: ", message(status));
}

Stream stream_of(const Tensor& tensor) { return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream(); }

// Backward and transposed merge: with memory for the partial sums, which the stream's later work may reuse at once.
template <typename Args>
void launch_with_workspace(Status (*launch)(const Args&, Stream), Args args, const Tensor& like) {
  const c10::cuda::CUDAGuard guard(like.device());
  const Tensor workspace = at::empty({workspace_floats(args)}, like.options().dtype(at::kFloat));
  args.workspace = workspace.data_ptr<float>();
  check_launched(launch(args, stream_of(like)));
}

struct Cuda {
  static constexpr bool kFloatWeights = false;

  static void check_limits(int64_t hidden, int64_t length, const char* name) {
    TORCH_CHECK_VALUE(hidden <= kMaxHidden, "the last dimension is ", hidden, ", but the CUDA kernels go up to ",
                      kMaxHidden);
    TORCH_CHECK_VALUE(length <= kMaxIncrements, name, " has length ", length, ", but the CUDA kernels go up to ",
                      kMaxIncrements);
  }

  static void forward(const ForwardArgs& args, const Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    check_launched(launch_forward(args, stream_of(like)));
  }
  static void backward(const BackwardArgs& args, const Tensor& like) {
    launch_with_workspace(launch_backward, args, like);
  }
  static void transposed(const TransposedArgs& args, const Tensor& like) {
    launch_with_workspace(launch_transposed, args, like);
  }
};

}  // namespace
}  // namespace merge_norm::cuda

TORCH_LIBRARY_IMPL(megatron_iiet, CUDA, m) {
  using merge_norm::cuda::Cuda;
  m.impl("merge_norm", merge_norm::merge_norm<Cuda>);
  m.impl("merge_norm_backward", merge_norm::merge_norm_backward<Cuda>);
  m.impl("transposed_merge", merge_norm::transposed_merge<Cuda>);
}
