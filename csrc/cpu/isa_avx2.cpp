#define MERGE_NORM_NAMESPACE isa_avx2
#define MERGE_NORM_TABLE kernels_avx2
#include "kernels.inl"
