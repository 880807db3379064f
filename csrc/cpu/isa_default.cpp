#define MERGE_NORM_NAMESPACE isa_default
#define MERGE_NORM_TABLE kernels_default
#include "kernels.inl"
