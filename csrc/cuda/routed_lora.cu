// routed_lora: sum_c weights[b, c] scaling[c] B_c A_c x, the routed top layer of HiDe-LLaVA (ACL 2025), as two products
// over the concatenated tasks, of all linears with this x in one launch each. Shrink: hidden = (x A^T) * weight,
// through tensor cores for 16-bit dtypes. Expand: output = hidden B^T in float32 arithmetic, since hidden stays
// float32. Emulated on the CPU only; not yet run on a GPU (docs/kernels.md).
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

// The linears of one launch: a kernel parameter. Their hidden columns, and their column blocks of the expansion, lie
// side by side.
constexpr int kLinears = 8;

struct Linear {
  const void* a;         // [tasks * rank, in]
  const void* b;         // [tasks, out, rank]
  const float* scaling;  // [tasks]
  const void* onto;      // [rows, out] or null
  void* output;          // [rows, out]
  std::int64_t out, rank;
  std::int64_t first_hidden;        // column of this launch's hidden
  std::int64_t first_column_block;  // of the expansion
  bool vectorized_output;           // and onto
};

struct Linears {
  Linear of[kLinears];
  int count;
};

// The last linear whose `first` is not beyond `place`.
__device__ __forceinline__ int owner(const Linears& linears, std::int64_t Linear::* first, std::int64_t place) {
  int l = 0;
  for (int next = 1; next < linears.count; ++next) {
    if (linears.of[next].*first <= place) l = next;
  }
  return l;
}

struct Shrink {
  const void* x;         // [rows, in]
  const float* weights;  // [batch, tasks]
  float* hidden_out;     // [rows, hidden]
  std::int64_t rows, in, tokens, tasks, hidden;
};

template <class T>
__device__ __forceinline__ const T* row_of_a(const Linears& linears, std::int64_t column, std::int64_t in) {
  const Linear& linear = linears.of[owner(linears, &Linear::first_hidden, column)];
  return static_cast<const T*>(linear.a) + (column - linear.first_hidden) * in;
}

__device__ __forceinline__ float routing(const Shrink& s, const Linears& linears, std::int64_t row,
                                         std::int64_t column) {
  const Linear& linear = linears.of[owner(linears, &Linear::first_hidden, column)];
  const std::int64_t task = (column - linear.first_hidden) / linear.rank;
  return s.weights[row / s.tokens * s.tasks + task] * linear.scaling[task];
}

// A block computes 16 rows x (8 kGroups) columns; its warps share the inner dimension out in pieces of 32 and are added
// in order at the end. Fragments come straight from global memory: the inner index may be permuted as long as both
// operands agree, so a lane loads 8 neighbouring elements and feeds two mma with them.
constexpr int kShrinkRows = 16;

template <class T, bool kVectorized, int kGroups>
__global__ void __launch_bounds__(kThreads) shrink_tensor(Shrink s, const __grid_constant__ Linears linears) {
  constexpr int kColumns = 8 * kGroups;
  HPA_SHARED(partial, float[kWarps][kShrinkRows][kColumns]);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kShrinkRows + group;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kColumns + group;
  const T* const x = static_cast<const T*>(s.x);
  const T* a_rows[kGroups];  // null past the last column
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    a_rows[n] = column + n * 8 < s.hidden ? row_of_a<T>(linears, column + n * 8, s.in) : nullptr;
  }

  float sums[kGroups][4] = {};
  for (std::int64_t piece = static_cast<std::int64_t>(warp) * 32; piece < s.in; piece += kWarps * 32) {
    const std::int64_t k = piece + in_group * 8;
    const int count = eight_count(k, s.in);
    const Eight<T> x_upper = row < s.rows ? load_eight<kVectorized>(x + row * s.in + k, count) : zero_eight<T>();
    const Eight<T> x_lower =
        row + 8 < s.rows ? load_eight<kVectorized>(x + (row + 8) * s.in + k, count) : zero_eight<T>();
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const Eight<T> a_row = a_rows[n] != nullptr ? load_eight<kVectorized>(a_rows[n] + k, count) : zero_eight<T>();
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
    s.hidden_out[out_row * s.hidden + out_column] = total * routing(s, linears, out_row, out_column);
  }
}

// float32: a warp computes 4 rows x 4 columns, its lanes sharing the inner dimension out.
constexpr int kDotRows = 4;
constexpr int kDotColumns = 4;

template <bool kVectorized>
__global__ void __launch_bounds__(kThreads) shrink_float(Shrink s, const __grid_constant__ Linears linears) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kDotRows;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarp) * kDotColumns;
  if (column >= s.hidden) return;
  const float* const x = static_cast<const float*>(s.x);
  const float* a_rows[kDotColumns];
#pragma unroll
  for (int n = 0; n < kDotColumns; ++n) {
    a_rows[n] = column + n < s.hidden ? row_of_a<float>(linears, column + n, s.in) : nullptr;
  }
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
          a_rows[n] != nullptr ? load_eight<kVectorized>(a_rows[n] + k, count) : zero_eight<float>();
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
        s.hidden_out[(row + r) * s.hidden + column + n] = total * routing(s, linears, row + r, column + n);
      }
    }
  }
}

// output [rows, out] = hidden [rows, own of hidden] B^T, B [tasks, out, rank]. A thread computes 4 rows x (4 + 4)
// columns.
constexpr int kExpandRows = 64;
constexpr int kExpandColumns = 128;
constexpr int kExpandDepth = 32;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    expand(const float* all_hidden, std::int64_t hidden_stride, std::int64_t rows, std::int64_t tasks,
           std::int64_t row_blocks, const __grid_constant__ Linears linears) {
  HPA_SHARED(hidden_tile, float[kExpandDepth][kExpandRows + 4]);
  HPA_SHARED(b_tile, float[kExpandDepth][kExpandColumns + 4]);
  const int own_k = threadIdx.x % kExpandDepth;
  const int own_row = threadIdx.x / kExpandDepth;
  const int thread_column = threadIdx.x % 16 * 4;
  const int thread_row = threadIdx.x / 16 * 4;
  const std::int64_t column_block = blockIdx.x / row_blocks;
  const Linear& linear = linears.of[owner(linears, &Linear::first_column_block, column_block)];
  const std::int64_t first_row = blockIdx.x % row_blocks * kExpandRows;
  const std::int64_t first_column = (column_block - linear.first_column_block) * kExpandColumns;
  const std::int64_t out = linear.out, rank = linear.rank, hidden = tasks * rank;
  const float* const hidden_in = all_hidden + linear.first_hidden;
  const T* const b = static_cast<const T*>(linear.b);
  const T* const onto = static_cast<const T*>(linear.onto);
  T* const output = static_cast<T*>(linear.output);

  float sums[4][8] = {};
  for (std::int64_t base = 0; base < hidden; base += kExpandDepth) {
    const std::int64_t k = base + own_k;
    const std::int64_t task = k / rank;
    for (int r = own_row; r < kExpandRows; r += kThreads / kExpandDepth) {
      const std::int64_t row = first_row + r;
      hidden_tile[own_k][r] = k < hidden && row < rows ? hidden_in[row * hidden_stride + k] : 0.0f;
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
      const std::int64_t place = row * out + column;
      const bool whole = linear.vectorized_output && column + 4 <= out;
      Four<T> rounded;
#pragma unroll
      for (int c = 0; c < 4; ++c) from_float(sums[r][half * 4 + c], rounded.values[c]);
      if (onto != nullptr) {
        // The rounded sum is added, as if it had been written and read again.
        Four<T> before;
        if (whole) {
          before = *reinterpret_cast<const Four<T>*>(onto + place);
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) before.values[c] = column + c < out ? onto[place + c] : T{};
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          from_float(to_float(before.values[c]) + to_float(rounded.values[c]), rounded.values[c]);
        }
      }
      if (whole) {
        *reinterpret_cast<Four<T>*>(output + place) = rounded;
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (column + c < out) output[place + c] = rounded.values[c];
        }
      }
    }
  }
}

template <class T, bool kVectorized>
Status run_shrink(const Shrink& s, const Linears& linears, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    const std::int64_t column_blocks = ceil_div<std::int64_t>(s.hidden, kDotColumns * kWarps);
    return launch(shrink_float<kVectorized>, grid_of(ceil_div<std::int64_t>(s.rows, kDotRows), column_blocks), kThreads,
                  0, stream, s, linears);
  } else {
    const std::int64_t row_blocks = ceil_div<std::int64_t>(s.rows, kShrinkRows);
    // Few rows, as in decoding: narrow blocks, so that more of them read A at once.
    if (row_blocks < 32) {
      return launch(shrink_tensor<T, kVectorized, 1>, grid_of(row_blocks, ceil_div<std::int64_t>(s.hidden, 8)),
                    kThreads, 0, stream, s, linears);
    }
    return launch(shrink_tensor<T, kVectorized, 8>, grid_of(row_blocks, ceil_div<std::int64_t>(s.hidden, 64)), kThreads,
                  0, stream, s, linears);
  }
}

constexpr std::int64_t kMaximumSize = std::int64_t{1} << 31;

// Both products of up to kLinears linears.
template <class T>
Status run(const RoutedLoraArguments& r, const RoutedLoraLinear* first, int count, float* hidden_values,
           Stream stream) {
  const std::int64_t rows = r.batch * r.tokens;
  Linears linears{};
  linears.count = count;
  std::int64_t hidden = 0, column_blocks = 0;
  bool vectorized = aligned16(r.x) && r.in * sizeof(T) % 16 == 0;
  for (int l = 0; l < count; ++l) {
    const RoutedLoraLinear& one = first[l];
    HPA_REQUIRE(one.out <= kMaximumSize, "out: is too large");
    const bool vectorized_output = aligned16(one.output) && aligned16(one.onto) && one.out % 4 == 0;
    linears.of[l] = {
        one.a,  one.b,         one.scaling,      one.onto, one.output, one.out, larger<std::int64_t>(one.rank, 1),
        hidden, column_blocks, vectorized_output};
    vectorized = vectorized && aligned16(one.a);
    hidden += r.tasks * one.rank;
    HPA_REQUIRE(hidden <= kMaximumGridYZ * 8, "rank: tasks * rank is too large");
    column_blocks += ceil_div<std::int64_t>(one.out, kExpandColumns);
  }
  if (column_blocks == 0) return {};
  if (hidden > 0) {
    HPA_REQUIRE_WORKSPACE(hidden_values);
    const Shrink s{r.x, r.weights, hidden_values, rows, r.in, r.tokens, r.tasks, hidden};
    HPA_RETURN_UNLESS_OK(
        with_bool(vectorized, [&](auto flag) { return run_shrink<T, decltype(flag)::value>(s, linears, stream); }));
  }
  const std::int64_t row_blocks = ceil_div<std::int64_t>(rows, kExpandRows);
  HPA_REQUIRE(row_blocks <= kMaximumGrid / column_blocks, "output: is too large");
  return launch(expand<T>, grid_of(row_blocks * column_blocks), kThreads, 0, stream, hidden_values, hidden, rows,
                r.tasks, row_blocks, linears);
}

}  // namespace

std::size_t routed_lora_workspace_bytes(const RoutedLoraArguments& r) {
  if (r.batch <= 0 || r.tokens <= 0 || r.tasks <= 0) return 0;
  // Launches follow each other on the stream, and so use the same memory.
  std::int64_t most = 0;
  for (std::int64_t first = 0; first < r.count; first += kLinears) {
    std::int64_t hidden = 0;
    for (std::int64_t l = first; l < smaller<std::int64_t>(r.count, first + kLinears); ++l) {
      hidden += r.tasks * larger<std::int64_t>(r.linears[l].rank, 0);
    }
    most = larger(most, hidden);
  }
  return static_cast<std::size_t>(r.batch * r.tokens * most) * sizeof(float);
}

Status routed_lora(const RoutedLoraArguments& arguments, void* workspace, Stream stream) {
  const RoutedLoraArguments& r = arguments;
  HPA_RETURN_UNLESS_OK(check_routed_lora(r));
  const std::int64_t rows = r.batch * r.tokens;
  if (rows == 0) return {};
  HPA_REQUIRE(rows <= kMaximumSize, "tokens: batch * tokens is too large");
  return with_dtype(r.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (std::int64_t first = 0; first < r.count; first += kLinears) {
      const int count = static_cast<int>(smaller<std::int64_t>(r.count - first, kLinears));
      HPA_RETURN_UNLESS_OK(run<T>(r, r.linears + first, count, static_cast<float*>(workspace), stream));
    }
    return Status{};
  });
}

}  // namespace hpa::cuda
