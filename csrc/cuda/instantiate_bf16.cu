// The kernels for one storage type; a file of its own so that the three compile in parallel.
#include "merge_norm/launch.cuh"

namespace merge_norm {

template Status launch_forward_as<bf16>(const ForwardArgs&, Stream);
template Status launch_backward_as<bf16>(const BackwardArgs&, Stream);
template Status launch_transposed_as<bf16>(const TransposedArgs&, Stream);

}  // namespace merge_norm
