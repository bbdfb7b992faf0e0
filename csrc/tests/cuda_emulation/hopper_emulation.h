// Twins of csrc/cuda/hopper.cuh after the PTX ISA: "mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level
// matrix shared memory layout" with its canonical layouts and matrix descriptor, "Matrix fragments for
// wgmma.mma_async.m64nNk16", and the documentation of cuTensorMapEncodeTiled.
//
// What is asynchronous happens late (copies when somebody waits for their barrier, products at wgmma.wait_group, writes
// of zeros at the proxy fence) or at once, as Settings::copy_at_once says: a missing wait or fence shows in the first,
// memory handed on too early in the second.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulation.h"
#include "ptx_emulation.h"

// ------------------------------------------------------------------------------------------- the driver's tensor maps
using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  std::uint64_t opaque[16];
};
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

namespace hpa::cuda {
struct BFloat16;
struct Float16;
}  // namespace hpa::cuda

namespace hpa::cuda::ptx {

void barrier_init(SharedAddress barrier, unsigned arrivals);
void fence_barrier_init();
void barrier_arrive(SharedAddress barrier);
void barrier_arrive_expecting(SharedAddress barrier, unsigned bytes);
void barrier_wait(SharedAddress barrier, unsigned parity);
void fence_proxy_async();
void store_zeros_16(SharedAddress address);
void copy_box(SharedAddress target, const CUtensorMap* map, SharedAddress barrier, int column, int row);
void named_barrier(int number, int threads);

void set_registers(int count, bool raise);
template <int kRegisters>
void raise_registers() {
  set_registers(kRegisters, true);
}
template <int kRegisters>
void lower_registers() {
  set_registers(kRegisters, false);
}

void wgmma_fence();
void wgmma_commit();
void wgmma_wait_group(int pending);
template <int kPending>
void wgmma_wait() {
  wgmma_wait_group(kPending);
}
template <int kSize>
void hold(float (&)[kSize]) {}

void wgmma_m64n128k16_transposed(float* d, std::uint64_t a, std::uint64_t b, float (*to_float)(std::uint16_t));
template <class T>
void wgmma_m64n128k16(float (&d)[64], std::uint64_t a, std::uint64_t b);
template <>
inline void wgmma_m64n128k16<BFloat16>(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  wgmma_m64n128k16_transposed(d, a, b, float_of_bfloat);
}
template <>
inline void wgmma_m64n128k16<Float16>(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  wgmma_m64n128k16_transposed(d, a, b, float_of_half);
}

}  // namespace hpa::cuda::ptx
