#include "simd_avx2.h"

#include "kernels.h"

const Kernels kAvx2Kernels = kKernels;
