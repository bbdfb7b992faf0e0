// What every kernel file starts from: the CUDA runtime (or its emulation), shared memory, and the one way to launch.
//
// With HPA_CUDA_EMULATION the same sources compile as plain C++ against csrc/tests/cuda_emulation, which runs the
// threads of a block as fibers. That checks logic, indexing and barriers; it says nothing about real hardware.
#pragma once

#ifdef HPA_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "hpa/types.h"

namespace hpa::cuda {

template <class Type>
using Exactly = Type;  // lets HPA_SHARED take array types

#ifdef HPA_CUDA_EMULATION
#define HPA_SHARED(name, ...) static auto& name = hpa_emulation::shared_variable<__VA_ARGS__>()
#define HPA_DYNAMIC_SHARED(name) unsigned char* const name = hpa_emulation::dynamic_shared()
#else
#define HPA_SHARED(name, ...) __shared__::hpa::cuda::Exactly<__VA_ARGS__> name
#define HPA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int kWarp = 32;
constexpr std::int64_t kMaximumGrid = 2147483647;  // blocks along x
constexpr std::int64_t kMaximumGridYZ = 65535;     // blocks along y or z

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer value, Integer by) {
  return (value + by - 1) / by;
}

template <class Integer>
__host__ __device__ constexpr Integer round_up(Integer value, Integer to) {
  return ceil_div(value, to) * to;
}

template <class Number>
__host__ __device__ constexpr Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <class Number>
__host__ __device__ constexpr Number larger(Number a, Number b) {
  return a < b ? b : a;
}

// The Status of a CUDA call. Clears the runtime's last error, which is reported here and must not surface in the
// caller's next, unrelated check.
inline Status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return {StatusCode::device_error, what, static_cast<std::int32_t>(error)};
}

// Launches on `stream` and reports the launch's own status; errors inside a kernel surface at the caller's next
// synchronisation, as everywhere in CUDA.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t dynamic_shared_bytes, Stream stream,
              Arguments... arguments) {
  if (dynamic_shared_bytes > 48 * 1024) {
    const Status raised =
        checked(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(dynamic_shared_bytes)),
                "could not raise a kernel's shared memory limit");
    if (!raised.ok()) return raised;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return checked(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                 "a CUDA kernel launch failed");
}

inline dim3 grid_of(std::int64_t x, std::int64_t y = 1, std::int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

}  // namespace hpa::cuda
