// A tile of B A in registers: 128 rows of the weight x 128 columns by 256 threads, each with eight segments of eight
// neighbouring columns, so that it meets the weight in 16 bytes of a 16-bit dtype. TensorProduct is for A and B of one
// 16-bit dtype, FloatProduct for all else.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_pipeline.cuh"
#include "hpa/types.h"

namespace hpa::cuda {

constexpr int kLowRankThreads = 256;
constexpr int kLowRankTile = 128;
constexpr int kSegments = 8;

struct LowRankFactors {
  const void* a;  // [rank, columns]
  const void* b;  // [rows, rank]
  DType a_dtype, b_dtype;
  std::int64_t a_stride, b_stride, rank, rows, columns;
};

// Exchanges among the four lanes of a quad: lane q gets, of each lane p, its pair q.
__device__ __forceinline__ void exchange_in_quad(float (&pairs)[4][2]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if ((p & bit) != 0) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float received = __shfl_xor_sync(0xffffffffu, upper ? pairs[p][e] : pairs[p + bit][e], bit);
        if (upper) {
          pairs[p][e] = received;
        } else {
          pairs[p + bit][e] = received;
        }
      }
    }
  }
}

// mma.m16n8k16 with float32 accumulators, 32 of the rank at a time through two stages of cp.async. Warps are 4 x 2,
// each 32 x 64 of the tile.
template <class T, bool kVectorized>
struct TensorProduct {
  static constexpr int kDepth = 32;
  static constexpr int kLeftStride = 40;  // elements: rows of 80 bytes, whose fragments meet different banks
  static constexpr int kRightBytes = kDepth * kLowRankTile * 2;
  static constexpr int kStageBytes = kRightBytes + kLowRankTile * kLeftStride * 2;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  static constexpr int kColumnGroups = 2;
  static constexpr int kRowGroups = 32;

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / kWarp / 2; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / kWarp % 2; }
  static __device__ __forceinline__ int row(int segment) {
    return warp_row() * 32 + segment / 2 % 2 * 16 + segment % 2 * 8 + static_cast<int>(threadIdx.x % kWarp) / 4;
  }
  static __device__ __forceinline__ int column(int column_group) {
    return warp_column() * 64 + column_group * 32 + static_cast<int>(threadIdx.x % 4) * 8;
  }
  static __device__ __forceinline__ int row_group() {
    return warp_row() * 8 + static_cast<int>(threadIdx.x % kWarp) / 4;
  }

  // The 16 bytes of `source` that begin at `first` of `length` elements, zeros where there are none.
  static __device__ __forceinline__ void copy_chunk(unsigned char* shared, const T* source, bool present,
                                                    std::int64_t first, std::int64_t length) {
    if constexpr (kVectorized) {
      const bool keep = present && first < length;
      ptx::cp_async_16(ptx::shared_address(shared), source + (keep ? first : 0), keep);
    } else {
      T* const target = reinterpret_cast<T*>(shared);
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = present && first + i < length ? source[first + i] : T{0};
    }
  }

  static __device__ __forceinline__ void load_stage(const LowRankFactors& f, std::int64_t first_row,
                                                    std::int64_t first_column, std::int64_t k, unsigned char* stage) {
    const T* const a = static_cast<const T*>(f.a);
    const T* const b = static_cast<const T*>(f.b);
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const int own = threadIdx.x + pass * kLowRankThreads;
      const int depth = own / 16, chunk = own % 16;
      const bool has_depth = k + depth < f.rank;
      copy_chunk(stage + depth * 256 + (chunk ^ (depth & 7)) * 16, a + (has_depth ? (k + depth) * f.a_stride : 0),
                 has_depth, first_column + chunk * 8, f.columns);
      const int row = own / 4, part = own % 4;
      const bool has_row = first_row + row < f.rows;
      copy_chunk(stage + kRightBytes + row * kLeftStride * 2 + part * 16,
                 b + (has_row ? (first_row + row) * f.b_stride : 0), has_row, k + part * 8, f.rank);
    }
  }

  static __device__ __forceinline__ void multiply_stage(const unsigned char* stage, int depth, float (&sums)[2][8][4]) {
    const int lane = threadIdx.x % kWarp;
    const int matrix = lane / 8, matrix_row = lane % 8;
    const ptx::SharedAddress right = ptx::shared_address(stage);
    const std::uint32_t* const left = reinterpret_cast<const std::uint32_t*>(stage + kRightBytes) +
                                      (warp_row() * 32 + lane / 4) * (kLeftStride / 2) + lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k >= depth) break;
      std::uint32_t fragment[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          fragment[m][part] = left[(m * 16 + part % 2 * 8) * (kLeftStride / 2) + k / 2 + part / 2 * 4];
        }
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const int row = k + matrix % 2 * 8 + matrix_row;
        const int chunk = warp_column() * 8 + n + matrix / 2;
        std::uint32_t columns[4];
        ptx::ldmatrix_x4_trans(columns, right + row * 256 + (chunk ^ (row & 7)) * 16);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply(sums[m][n], fragment[m], columns[0], columns[1]);
          multiply(sums[m][n + 1], fragment[m], columns[2], columns[3]);
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&sum)[4], const std::uint32_t (&left)[4], std::uint32_t low,
                                                  std::uint32_t high) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      ptx::mma_m16n8k16_bf16(sum, left, low, high);
    } else {
      ptx::mma_m16n8k16_f16(sum, left, low, high);
    }
  }

  // shared is free again when this returns.
  static __device__ __forceinline__ void compute(const LowRankFactors& f, std::int64_t first_row,
                                                 std::int64_t first_column, unsigned char* shared,
                                                 float (&values)[kSegments][8]) {
    float sums[2][8][4] = {};
    const int stages = static_cast<int>(ceil_div<std::int64_t>(f.rank, kDepth));
    if (stages > 0) load_stage(f, first_row, first_column, 0, shared);
    ptx::cp_async_commit();
    for (int s = 0; s < stages; ++s) {
      if (s + 1 < stages) {
        load_stage(f, first_row, first_column, static_cast<std::int64_t>(s + 1) * kDepth,
                   shared + (s + 1) % 2 * kStageBytes);
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();
      const std::int64_t left = f.rank - static_cast<std::int64_t>(s) * kDepth;
      multiply_stage(shared + s % 2 * kStageBytes, left < kDepth ? static_cast<int>(left) : kDepth, sums);
      __syncthreads();
    }
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      float pairs[4][2];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
#pragma unroll
        for (int e = 0; e < 2; ++e) pairs[p][e] = sums[segment / 2 % 2][segment / 4 * 4 + p][segment % 2 * 2 + e];
      }
      exchange_in_quad(pairs);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[segment][i] = pairs[i / 2][i % 2];
    }
  }
};

// float32 arithmetic; A and B of any dtypes, widened on their way to shared memory. A thread has 8 rows of 8 columns.
struct FloatProduct {
  static constexpr int kDepth = 16;
  static constexpr int kStride = kLowRankTile + 4;  // floats
  static constexpr int kSharedBytes = 2 * kDepth * kStride * 4;
  static constexpr int kColumnGroups = 1;
  static constexpr int kRowGroups = 16;

  static __device__ __forceinline__ int row(int segment) { return static_cast<int>(threadIdx.x) / 16 * 8 + segment; }
  static __device__ __forceinline__ int column(int) { return static_cast<int>(threadIdx.x) % 16 * 8; }
  static __device__ __forceinline__ int row_group() { return static_cast<int>(threadIdx.x) / 16; }

  static __device__ __forceinline__ float element(const void* data, DType dtype, std::int64_t index) {
    if (dtype == DType::float32) return static_cast<const float*>(data)[index];
    if (dtype == DType::float16) return to_float(static_cast<const Float16*>(data)[index]);
    return to_float(static_cast<const BFloat16*>(data)[index]);
  }

  static __device__ __forceinline__ void compute(const LowRankFactors& f, std::int64_t first_row,
                                                 std::int64_t first_column, unsigned char* shared,
                                                 float (&values)[kSegments][8]) {
    float (*const right)[kStride] = reinterpret_cast<float (*)[kStride]>(shared);
    float (*const left)[kStride] = right + kDepth;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[s][i] = 0.0f;
    }
    for (std::int64_t base = 0; base < f.rank; base += kDepth) {
#pragma unroll
      for (int e = threadIdx.x; e < kDepth * kLowRankTile; e += kLowRankThreads) {
        const std::int64_t k = base + e / kLowRankTile, column = first_column + e % kLowRankTile;
        right[e / kLowRankTile][e % kLowRankTile] =
            k < f.rank && column < f.columns ? element(f.a, f.a_dtype, k * f.a_stride + column) : 0.0f;
        const std::int64_t row = first_row + e / kDepth, depth = base + e % kDepth;
        left[e % kDepth][e / kDepth] =
            depth < f.rank && row < f.rows ? element(f.b, f.b_dtype, row * f.b_stride + depth) : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        float columns[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) columns[i] = right[k][column(0) + i];
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          const float one = left[k][row(s)];
#pragma unroll
          for (int i = 0; i < 8; ++i) values[s][i] += one * columns[i];
        }
      }
      __syncthreads();
    }
  }
};

}  // namespace hpa::cuda
