#include "simd_avx512.h"

#include "kernels.h"

const Kernels kAvx512Bf16Kernels = kKernels;
