// routed_lora: sum_c weights[b, c] scaling[c] B_c A_c x, the routed top layer of HiDe-LLaVA (ACL 2025), as two products
// over the concatenated tasks. Shrink: hidden = (x A^T) * weight, through tensor cores for 16-bit dtypes. Expand:
// output = hidden B^T in float32 arithmetic, since hidden stays float32. Emulated on the CPU only; not yet run on a GPU
// (docs/kernels.md).
#include <type_traits>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "hpa/routed_lora.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Shrink {
  const void* x;         // [rows, in]
  const void* a;         // [hidden, in]
  const float* weights;  // [batch, tasks]
  const float* scaling;  // [tasks]
  float* hidden_out;     // [rows, hidden]
  std::int64_t rows, in, tokens, tasks, rank, hidden;
};

__device__ __forceinline__ float routing(const Shrink& s, std::int64_t row, std::int64_t column) {
  const std::int64_t task = column / s.rank;
  return s.weights[row / s.tokens * s.tasks + task] * s.scaling[task];
}

// A block computes 16 rows x (8 kGroups) columns; its warps share the inner dimension out in pieces of 32 and are added
// in order at the end. Fragments come straight from global memory: the inner index may be permuted as long as both
// operands agree, so a lane loads 8 neighbouring elements and feeds two mma with them.
constexpr int kShrinkRows = 16;

template <class T, bool kVectorized, int kGroups>
__global__ void __launch_bounds__(kThreads) shrink_tensor(Shrink s) {
  constexpr int kColumns = 8 * kGroups;
  HPA_SHARED(partial, float[kWarps][kShrinkRows][kColumns]);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kShrinkRows + group;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kColumns + group;
  const T* const x = static_cast<const T*>(s.x);
  const T* const a = static_cast<const T*>(s.a);

  float sums[kGroups][4] = {};
  for (std::int64_t piece = static_cast<std::int64_t>(warp) * 32; piece < s.in; piece += kWarps * 32) {
    const std::int64_t k = piece + in_group * 8;
    const int count = eight_count(k, s.in);
    const Eight<T> x_upper = row < s.rows ? load_eight<kVectorized>(x + row * s.in + k, count) : zero_eight<T>();
    const Eight<T> x_lower =
        row + 8 < s.rows ? load_eight<kVectorized>(x + (row + 8) * s.in + k, count) : zero_eight<T>();
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const std::int64_t own = column + n * 8;
      const Eight<T> a_row = own < s.hidden ? load_eight<kVectorized>(a + own * s.in + k, count) : zero_eight<T>();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t fragment[4] = {x_upper.words[2 * half], x_lower.words[2 * half],
                                           x_upper.words[2 * half + 1], x_lower.words[2 * half + 1]};
        if constexpr (std::is_same_v<T, BFloat16>) {
          ptx::mma_m16n8k16_bf16(sums[n], fragment, a_row.words[2 * half], a_row.words[2 * half + 1]);
        } else {
          ptx::mma_m16n8k16_f16(sums[n], fragment, a_row.words[2 * half], a_row.words[2 * half + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[warp][group + (i >= 2 ? 8 : 0)][n * 8 + in_group * 2 + i % 2] = sums[n][i];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kShrinkRows * kColumns; e += kThreads) {
    const std::int64_t out_row = static_cast<std::int64_t>(blockIdx.x) * kShrinkRows + e / kColumns;
    const std::int64_t out_column = static_cast<std::int64_t>(blockIdx.y) * kColumns + e % kColumns;
    if (out_row >= s.rows || out_column >= s.hidden) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w][e / kColumns][e % kColumns];
    s.hidden_out[out_row * s.hidden + out_column] = total * routing(s, out_row, out_column);
  }
}

// float32: a warp computes 4 rows x 4 columns, its lanes sharing the inner dimension out.
constexpr int kDotRows = 4;
constexpr int kDotColumns = 4;

template <bool kVectorized>
__global__ void __launch_bounds__(kThreads) shrink_float(Shrink s) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kDotRows;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarp) * kDotColumns;
  if (column >= s.hidden) return;
  const float* const x = static_cast<const float*>(s.x);
  const float* const a = static_cast<const float*>(s.a);
  float sums[kDotRows][kDotColumns] = {};
  for (std::int64_t k = lane * 8; k < s.in; k += kWarp * 8) {
    const int count = eight_count(k, s.in);
    Eight<float> x_rows[kDotRows];
#pragma unroll
    for (int r = 0; r < kDotRows; ++r) {
      x_rows[r] = row + r < s.rows ? load_eight<kVectorized>(x + (row + r) * s.in + k, count) : zero_eight<float>();
    }
#pragma unroll
    for (int n = 0; n < kDotColumns; ++n) {
      const Eight<float> a_row =
          column + n < s.hidden ? load_eight<kVectorized>(a + (column + n) * s.in + k, count) : zero_eight<float>();
#pragma unroll
      for (int r = 0; r < kDotRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[r][n] += x_rows[r].value(i) * a_row.value(i);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kDotRows; ++r) {
#pragma unroll
    for (int n = 0; n < kDotColumns; ++n) {
      const float total = warp_sum(sums[r][n]);
      if (lane == 0 && row + r < s.rows && column + n < s.hidden) {
        s.hidden_out[(row + r) * s.hidden + column + n] = total * routing(s, row + r, column + n);
      }
    }
  }
}

// output [rows, out] = hidden [rows, hidden] B^T, B [tasks, out, rank]. A thread computes 4 rows x (4 + 4) columns.
constexpr int kExpandRows = 64;
constexpr int kExpandColumns = 128;
constexpr int kExpandDepth = 32;

template <class T>
__global__ void __launch_bounds__(kThreads)
    expand(const float* hidden_in, const T* b, T* output, std::int64_t rows, std::int64_t out, std::int64_t hidden,
           std::int64_t rank, bool vectorized, std::int64_t row_blocks) {
  HPA_SHARED(hidden_tile, float[kExpandDepth][kExpandRows + 4]);
  HPA_SHARED(b_tile, float[kExpandDepth][kExpandColumns + 4]);
  const int own_k = threadIdx.x % kExpandDepth;
  const int own_row = threadIdx.x / kExpandDepth;
  const int thread_column = threadIdx.x % 16 * 4;
  const int thread_row = threadIdx.x / 16 * 4;
  const std::int64_t first_row = blockIdx.x % row_blocks * kExpandRows;
  const std::int64_t first_column = blockIdx.x / row_blocks * kExpandColumns;

  float sums[4][8] = {};
  for (std::int64_t base = 0; base < hidden; base += kExpandDepth) {
    const std::int64_t k = base + own_k;
    const std::int64_t task = k / rank;
    for (int r = own_row; r < kExpandRows; r += kThreads / kExpandDepth) {
      const std::int64_t row = first_row + r;
      hidden_tile[own_k][r] = k < hidden && row < rows ? hidden_in[row * hidden + k] : 0.0f;
    }
    for (int c = own_row; c < kExpandColumns; c += kThreads / kExpandDepth) {
      const std::int64_t column = first_column + c;
      b_tile[own_k][c] =
          k < hidden && column < out ? to_float(b[(task * out + column) * rank + (k - task * rank)]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int kk = 0; kk < kExpandDepth; ++kk) {
      float left[4], right[8];
#pragma unroll
      for (int r = 0; r < 4; ++r) left[r] = hidden_tile[kk][thread_row + r];
#pragma unroll
      for (int c = 0; c < 8; ++c) right[c] = b_tile[kk][thread_column + (c < 4 ? c : 60 + c)];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[r][c] += left[r] * right[c];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const std::int64_t row = first_row + thread_row + r;
    if (row >= rows) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t column = first_column + half * 64 + thread_column;
      T* const target = output + row * out + column;
      struct alignas(4 * sizeof(T)) Four {
        T values[4];
      } rounded;
#pragma unroll
      for (int c = 0; c < 4; ++c) from_float(sums[r][half * 4 + c], rounded.values[c]);
      if (vectorized && column + 4 <= out) {
        *reinterpret_cast<Four*>(target) = rounded;
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (column + c < out) target[c] = rounded.values[c];
        }
      }
    }
  }
}

template <class T, bool kVectorized>
Status run_shrink(const Shrink& s, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    const std::int64_t column_blocks = ceil_div<std::int64_t>(s.hidden, kDotColumns * kWarps);
    return launch(shrink_float<kVectorized>, grid_of(ceil_div<std::int64_t>(s.rows, kDotRows), column_blocks), kThreads,
                  0, stream, s);
  } else {
    const std::int64_t row_blocks = ceil_div<std::int64_t>(s.rows, kShrinkRows);
    // Few rows, as in decoding: narrow blocks, so that more of them read A at once.
    if (row_blocks < 32) {
      return launch(shrink_tensor<T, kVectorized, 1>, grid_of(row_blocks, ceil_div<std::int64_t>(s.hidden, 8)),
                    kThreads, 0, stream, s);
    }
    return launch(shrink_tensor<T, kVectorized, 8>, grid_of(row_blocks, ceil_div<std::int64_t>(s.hidden, 64)), kThreads,
                  0, stream, s);
  }
}

constexpr std::int64_t kMaximumSize = std::int64_t{1} << 31;

}  // namespace

std::size_t routed_lora_workspace_bytes(const RoutedLoraArguments& arguments) {
  if (arguments.batch <= 0 || arguments.tokens <= 0 || arguments.tasks <= 0 || arguments.rank <= 0) return 0;
  return static_cast<std::size_t>(arguments.batch * arguments.tokens * arguments.tasks * arguments.rank) *
         sizeof(float);
}

Status routed_lora(RoutedLoraArguments arguments, void* workspace, Stream stream) {
  const RoutedLoraArguments& r = arguments;
  HPA_RETURN_UNLESS_OK(check_routed_lora(r));
  const std::int64_t rows = r.batch * r.tokens;
  const std::int64_t hidden = r.tasks == 0 ? 0 : r.tasks * r.rank;
  if (rows == 0 || r.out == 0) return {};
  HPA_REQUIRE(rows <= kMaximumSize, "tokens: batch * tokens is too large");
  HPA_REQUIRE(hidden <= kMaximumGridYZ * 8, "rank: tasks * rank is too large");
  HPA_REQUIRE(r.out <= kMaximumSize, "out: is too large");
  if (hidden > 0) HPA_REQUIRE_WORKSPACE(workspace);
  float* const hidden_values = static_cast<float*>(workspace);
  return with_dtype(r.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (hidden > 0) {
      const Shrink s{r.x, r.a, r.weights, r.scaling, hidden_values, rows, r.in, r.tokens, r.tasks, r.rank, hidden};
      const bool vectorized = aligned16(r.x) && aligned16(r.a) && r.in * sizeof(T) % 16 == 0;
      const Status shrunk =
          with_bool(vectorized, [&](auto flag) { return run_shrink<T, decltype(flag)::value>(s, stream); });
      if (!shrunk.ok()) return shrunk;
    }
    const std::int64_t row_blocks = ceil_div<std::int64_t>(rows, kExpandRows);
    const std::int64_t column_blocks = ceil_div<std::int64_t>(r.out, kExpandColumns);
    HPA_REQUIRE(row_blocks <= kMaximumGrid / column_blocks, "output: is too large");
    const bool vectorized = aligned16(r.output) && r.out % 4 == 0;
    return launch(expand<T>, grid_of(row_blocks * column_blocks), kThreads, 0, stream, hidden_values,
                  static_cast<const T*>(r.b), static_cast<T*>(r.output), rows, r.out, hidden,
                  larger<std::int64_t>(r.rank, 1), vectorized, row_blocks);
  });
}

}  // namespace hpa::cuda
