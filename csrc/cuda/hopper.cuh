// The PTX of Hopper (sm_90a) that gram_sm90.cu uses: barriers in shared memory that count bytes, tiles copied by the
// tensor memory accelerator, and products of a warpgroup (four warps). csrc/tests/cuda_emulation/hopper_emulation.h
// holds the twins that the emulation uses.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"

#ifdef HPA_CUDA_EMULATION
#include "hopper_emulation.h"
#define HPA_HOPPER_CODE 1
#else
#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HPA_HOPPER_CODE 1
#else
#define HPA_HOPPER_CODE 0  // the kernel's body is empty for other architectures, and the host never launches it there
#endif

namespace hpa::cuda::ptx {

// A barrier of 8 bytes: a phase ends when `arrivals` threads have come and all bytes announced have been written.
__device__ __forceinline__ void barrier_init(SharedAddress barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copies that will complete on them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(SharedAddress barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended. The instruction itself suspends the thread for a while.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile(
        "{\n"
        "  .reg .pred ended;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Orders this thread's ordinary writes to shared memory before later reads by tensor cores and copies.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Sixteen zero bytes to shared memory.
__device__ __forceinline__ void store_zeros_16(SharedAddress address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// The box of the tensor map that starts at (column, row), to shared memory; elements outside the tensor become zeros.
// Announces all of the box's bytes as written to `barrier`.
__device__ __forceinline__ void copy_box(SharedAddress target, const CUtensorMap* map, SharedAddress barrier,
                                         int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// A barrier for `threads` threads of the block; number 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// How many registers each thread of this warpgroup may use from here on.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and whenever its registers have been touched otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving a use of the sums to before this point.
template <int kSize>
__device__ __forceinline__ void hold(float (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// d [64, 128] += a^T b by one warpgroup, for a [16, 64] and b [16, 128] in shared memory, both contiguous along the
// outputs (the two last immediates). Lane and warp hold rows 16 warp + lane / 4 (+ 8 for i >= 2) and columns
// 8 j + 2 (lane % 4) + i % 2 in d[4 j + i]. Asynchronous: d is there after commit and wait.
#define HPA_WGMMA_M64N128K16(TYPE)                                                                                  \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      "  .reg .pred add;\n"                                                                                         \
      "  setp.ne.b32 add, %66, 0;\n"                                                                                \
      "  wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, "  \
      "%65, add, 1, 1, 1, 1;\n"                                                                                     \
      "}\n"                                                                                                         \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
      : "l"(a), "l"(b), "n"(1))

template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], std::uint64_t a, std::uint64_t b);
template <>
__device__ __forceinline__ void wgmma_m64n128k16<BFloat16>(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  HPA_WGMMA_M64N128K16("bf16");
}
template <>
__device__ __forceinline__ void wgmma_m64n128k16<Float16>(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  HPA_WGMMA_M64N128K16("f16");
}
#undef HPA_WGMMA_M64N128K16

}  // namespace hpa::cuda::ptx
#endif
