// A small emulator of the part of CUDA that csrc/cuda uses, so that the kernels' sources run as C++ on any machine.
//
// A block's threads are fibers of one operating-system thread, switched at barriers and warp collectives in a
// configurable order: a missing barrier shows as a result that depends on the order. Shared memory is filled with NaN
// patterns before each block and allocated exactly, so that AddressSanitizer sees overruns. Asynchronous copies happen
// at the wait that orders them, or at once, as configured: a missing wait shows in the first, an early overwrite in
// the second. Threads at different collectives, or exited before one, end the program.
//
// It checks logic, indexing and barriers. It does not check memory ordering, alignment rules of the hardware beyond
// 16-byte copies, rounding inside tensor cores, occupancy or speed: what passes here has not run on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ------------------------------------------------------------------------------------------------ the language
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ------------------------------------------------------------------------------------------------ the emulator
namespace hpa_emulation {

enum class Order { forward, reverse, random };

struct Settings {
  // Of threads between barriers, and of blocks. random also lets each warp run ahead of the others.
  Order order = Order::forward;
  unsigned seed = 1;
  bool copy_at_once = false;  // asynchronous copies at their issue instead of at the wait
  int failing_launch = -1;    // the launch, counted from 0, that answers with an error
  int launches = 0;           // counted
  int compute_capability = 90;
};
Settings& settings();

// Memory for one __shared__ variable, filled anew before each block.
void* allocate_shared(std::size_t bytes);
template <class Type>
Type& shared_variable() {
  return *static_cast<Type*>(allocate_shared(sizeof(Type)));
}
unsigned char* dynamic_shared();
std::size_t dynamic_shared_bytes();

void block_barrier();

// Waits until every lane of the warp has come with its own argument, then lets `apply` see all 32 once.
using WarpFunction = void (*)(void* const* arguments);
void warp_collective(void* argument, WarpFunction apply);

// Waits until ready(argument) holds; other threads run meanwhile.
void wait_until(bool (*ready)(void* argument), void* argument);

// Ends the program: the kernel did what no GPU would survive, or what its results must not depend on.
[[noreturn]] void fail(const char* what);

// Called at the start of every block (begin) and when all its threads have exited.
using BlockHook = void (*)(bool begin);
void add_block_hook(BlockHook hook);

void copy_async(void* target, const void* source, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

template <class Value, class Combine>
Value exchange(Value value, Combine combine) {
  struct Lane {
    Value in, out;
    Combine* combine;
  } lane{value, value, &combine};
  warp_collective(&lane, [](void* const* arguments) {
    for (int l = 0; l < 32; ++l) {
      Lane* own = static_cast<Lane*>(arguments[l]);
      own->out = (*own->combine)(l, [&](int other) { return static_cast<Lane*>(arguments[other])->in; });
    }
  });
  return lane.out;
}

}  // namespace hpa_emulation

// ---------------------------------------------------------------------------------------------- device functions
using std::sqrt;
inline void __syncthreads() { hpa_emulation::block_barrier(); }
inline void __threadfence() {}
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return hpa_emulation::exchange(value, [mask](int lane, auto of) { return of(lane ^ mask); });
}
template <class Value>
Value __shfl_sync(unsigned, Value value, int source) {
  return hpa_emulation::exchange(value, [source](int, auto of) { return of(source & 31); });
}
template <class Value>
Value __shfl_up_sync(unsigned, Value value, int delta) {
  return hpa_emulation::exchange(value, [delta](int lane, auto of) { return of(lane < delta ? lane : lane - delta); });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  return hpa_emulation::exchange(static_cast<unsigned>(predicate), [](int, auto of) {
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) bits |= (of(l) != 0 ? 1u : 0u) << l;
    return bits;
  });
}
inline void __syncwarp() { (void)__ballot_sync(0xffffffffu, true); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
template <class Value>
Value __ldcs(const Value* address) {
  return *address;
}
template <class Value>
void __stcg(Value* address, Value value) {
  *address = value;
}
template <class Integer, class Operand>
Integer emulated_atomic(Integer* address, Operand value, bool minimum) {
  const Integer before = *address;
  const Integer operand = static_cast<Integer>(value);
  *address = minimum ? std::min(before, operand) : static_cast<Integer>(before + operand);
  return before;
}
inline int atomicAdd(int* address, int value) { return emulated_atomic(address, value, false); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return emulated_atomic(address, value, false); }
inline int atomicMin(int* address, int value) { return emulated_atomic(address, value, true); }

// -------------------------------------------------------------------------------------------------- the runtime
using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
cudaError_t cudaGetLastError();
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A Hopper with three multiprocessors, so that a block has several tiles to do even in small cases.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);

namespace hpa_emulation {
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const cudaError_t error = hpa_emulation::check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  hpa_emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
