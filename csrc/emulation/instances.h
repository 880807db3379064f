// The kernels of all storage types, compiled for the emulator; included by exactly one file of a program.
#pragma once

#include "../include/merge_norm/launch.cuh"

namespace merge_norm {

template Status launch_forward_as<float>(const ForwardArgs&, Stream);
template Status launch_forward_as<bf16>(const ForwardArgs&, Stream);
template Status launch_forward_as<f16>(const ForwardArgs&, Stream);
template Status launch_backward_as<float>(const BackwardArgs&, Stream);
template Status launch_backward_as<bf16>(const BackwardArgs&, Stream);
template Status launch_backward_as<f16>(const BackwardArgs&, Stream);
template Status launch_transposed_as<float>(const TransposedArgs&, Stream);
template Status launch_transposed_as<bf16>(const TransposedArgs&, Stream);
template Status launch_transposed_as<f16>(const TransposedArgs&, Stream);

}  // namespace merge_norm
