#define MERGE_NORM_NAMESPACE isa_avx512
#define MERGE_NORM_TABLE kernels_avx512
#include "kernels.inl"
