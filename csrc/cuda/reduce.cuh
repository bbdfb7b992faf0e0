// Reductions in a fixed order: the result depends on the values alone, never on timing.
#pragma once

#include "cuda/launch.cuh"

namespace hpa::cuda {

// The sum over a warp, in every lane.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum over a block of kThreads, in thread 0. `scratch` may be used again after the block's next barrier.
template <int kThreads, class Number>
__device__ __forceinline__ Number block_sum(Number value, Number (&scratch)[kThreads / kWarp]) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  Number total = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  }
  return total;
}

}  // namespace hpa::cuda
