#include "hpa/runtime.h"

#ifndef HPA_CUDA_VERSION
#define HPA_CUDA_VERSION ""
#define HPA_CUDA_ARCHITECTURES ""
#endif
#if defined(__clang__)
#define HPA_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define HPA_COMPILER "GCC " __VERSION__
#else
#define HPA_COMPILER "unknown"
#endif

namespace hpa {

BuildInfo build_info() { return {HPA_VERSION, HPA_COMPILER, HPA_CUDA_VERSION, HPA_CUDA_ARCHITECTURES}; }

}  // namespace hpa
