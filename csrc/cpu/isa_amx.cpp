#include "api.h"

// Assemblers and compilers before AMX leave this level out.
#ifdef __AMX_BF16__
#include "simd_avx512.h"
#include "simd_amx.h"

#include "kernels.h"

const Kernels* const kAmxKernels = &kKernels;
#else
const Kernels* const kAmxKernels = nullptr;
#endif
