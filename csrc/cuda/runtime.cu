// What the driver shows. Without a driver there are no devices, and nothing fails.
#include "cuda/launch.cuh"
#include "hpa/runtime.h"

namespace hpa::cuda {

std::int32_t device_count() {
  int count = 0;
  if (!checked(cudaGetDeviceCount(&count), "cudaGetDeviceCount").ok()) return 0;
  return count;
}

const char* error_text(std::int32_t device_code) { return cudaGetErrorString(static_cast<cudaError_t>(device_code)); }

}  // namespace hpa::cuda
