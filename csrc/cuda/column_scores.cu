// column_scores: sum_i D_ij^2 per column, <D, w_old> and ||w_old||^2 with D = w_new - w_old, both weights read once
// (HPA sections 3.1, 3.3). The matrix is cut into strips of rows; a block sums 256 columns of a strip, a second kernel
// adds the strips in float64 in a fixed order. Emulated on the CPU only; not yet run on a GPU (docs/kernels.md).
#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "hpa/column_scores.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockColumns = kWarp * 8;
constexpr int kRowLanes = kThreads / kWarp;
constexpr int kFinishColumns = 32;
// 8 for each of 132 multiprocessors; a constant, so that results do not depend on the device.
constexpr std::int64_t kTargetBlocks = 1056;
// The most float32 additions in a row that a thread makes, one for each row of its strip (8 columns, every 8th row).
constexpr std::int64_t kMaximumStripRows = 512;
static_assert(kMaximumStripRows % (4 * kRowLanes) == 0);

// How the matrix is cut, from its size alone.
struct Strips {
  std::int64_t column_blocks, rows_per_strip, count;
};

Strips strips_of(std::int64_t rows, std::int64_t columns) {
  Strips strips{};
  strips.column_blocks = ceil_div<std::int64_t>(columns, kBlockColumns);
  if (rows == 0 || columns == 0) return strips;
  const std::int64_t wanted = larger<std::int64_t>(1, ceil_div(kTargetBlocks, strips.column_blocks));
  const std::int64_t even = larger<std::int64_t>(64, ceil_div(rows, wanted));
  strips.rows_per_strip = smaller(kMaximumStripRows, round_up<std::int64_t>(even, 4 * kRowLanes));
  strips.count = ceil_div(rows, strips.rows_per_strip);
  return strips;
}

template <class T, bool kVectorized>
__global__ void __launch_bounds__(kThreads)
    sum_strips(const T* w_old, std::int64_t old_stride,  // [rows, columns]
               const T* w_new, std::int64_t new_stride,  // [rows, columns]
               std::int64_t rows, std::int64_t columns, std::int64_t rows_per_strip, std::int64_t column_blocks,
               float* column_parts,     // [strips, columns]
               float2* scalar_parts) {  // [strips, column_blocks]
  constexpr int kInFlight = kRowsInFlight<T, kVectorized>;
  HPA_SHARED(lane_sums, float[kRowLanes][8][kWarp + 1]);
  HPA_SHARED(inner_scratch, float[kRowLanes]);
  HPA_SHARED(norm_scratch, float[kRowLanes]);
  const int lane = threadIdx.x % kWarp;
  const int row_lane = threadIdx.x / kWarp;
  const std::int64_t strip = blockIdx.x / column_blocks;
  const std::int64_t block_first = blockIdx.x % column_blocks * kBlockColumns;
  const std::int64_t first = block_first + lane * 8;
  const int count = eight_count(first, columns);
  const std::int64_t end = smaller(rows, (strip + 1) * rows_per_strip);

  float sums[8] = {};
  float inner = 0.0f, norm = 0.0f;
  for (std::int64_t base = strip * rows_per_strip + row_lane; base < end; base += kRowLanes * kInFlight) {
    Eight<T> old_values[kInFlight], new_values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t row = base + u * kRowLanes;
      const int here = row < end ? count : 0;
      old_values[u] = load_eight<kVectorized>(w_old + (here > 0 ? row * old_stride + first : 0), here);
      new_values[u] = load_eight<kVectorized>(w_new + (here > 0 ? row * new_stride + first : 0), here);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float old_value = old_values[u].value(i);
        const float update = new_values[u].value(i) - old_value;
        sums[i] += update * update;
        inner += update * old_value;
        norm += old_value * old_value;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) lane_sums[row_lane][i][lane] = sums[i];
  const float block_inner = block_sum<kThreads>(inner, inner_scratch);
  const float block_norm = block_sum<kThreads>(norm, norm_scratch);  // its barriers also publish lane_sums
  if (threadIdx.x == 0) scalar_parts[blockIdx.x] = make_float2(block_inner, block_norm);
  const std::int64_t column = block_first + threadIdx.x;
  if (column < columns) {
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowLanes; ++r) total += lane_sums[r][threadIdx.x % 8][threadIdx.x / 8];
    column_parts[strip * columns + column] = total;
  }
}

// Blocks of 32 columns, and one block more for the two scalars.
__global__ void __launch_bounds__(kThreads)
    add_strips(const float* column_parts, const float2* scalar_parts, std::int64_t columns, std::int64_t strips,
               std::int64_t scalar_count, float* squared_update, float* inner_product, float* old_squared_norm) {
  HPA_SHARED(lane_totals, double[kRowLanes][kFinishColumns]);
  HPA_SHARED(inner_scratch, double[kRowLanes]);
  HPA_SHARED(norm_scratch, double[kRowLanes]);
  if (blockIdx.x == gridDim.x - 1) {
    double inner = 0.0, norm = 0.0;
    for (std::int64_t part = threadIdx.x; part < scalar_count; part += kThreads) {
      const float2 values = scalar_parts[part];
      inner += values.x;
      norm += values.y;
    }
    inner = block_sum<kThreads>(inner, inner_scratch);
    norm = block_sum<kThreads>(norm, norm_scratch);
    if (threadIdx.x == 0) {
      *inner_product = static_cast<float>(inner);
      *old_squared_norm = static_cast<float>(norm);
    }
    return;
  }
  const int lane = threadIdx.x % kFinishColumns;
  const int strip_lane = threadIdx.x / kFinishColumns;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kFinishColumns + lane;
  double total = 0.0;
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t strip = strip_lane; strip < strips; strip += kRowLanes)
      total += column_parts[strip * columns + column];
  }
  lane_totals[strip_lane][lane] = total;
  __syncthreads();
  if (strip_lane == 0 && column < columns) {
    total = 0.0;
#pragma unroll
    for (int r = 0; r < kRowLanes; ++r) total += lane_totals[r][lane];
    squared_update[column] = static_cast<float>(total);
  }
}

}  // namespace

std::size_t column_scores_workspace_bytes(std::int64_t rows, std::int64_t columns) {
  if (rows <= 0 || columns <= 0) return 0;
  const Strips strips = strips_of(rows, columns);
  // The scalars come first, so that both parts are aligned.
  return static_cast<std::size_t>(strips.count * (strips.column_blocks * 2 + columns)) * sizeof(float);
}

Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result, void* workspace, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_column_scores(w_old, w_new, result));
  const Strips strips = strips_of(w_old.rows, w_old.columns);
  const std::int64_t blocks = strips.count * strips.column_blocks;
  const std::int64_t finish_blocks = ceil_div<std::int64_t>(w_old.columns, kFinishColumns) + 1;
  HPA_REQUIRE(blocks <= kMaximumGrid && finish_blocks <= kMaximumGrid, "w_old: too many columns");
  if (blocks > 0) HPA_REQUIRE_WORKSPACE(workspace);
  float2* const scalar_parts = static_cast<float2*>(workspace);
  float* const column_parts = blocks > 0 ? static_cast<float*>(workspace) + 2 * blocks : nullptr;
  if (blocks > 0) {
    const bool vectorized = rows_aligned16(w_old) && rows_aligned16(w_new);
    const Status summed = with_dtype(w_old.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return with_bool(vectorized, [&](auto flag) {
        return launch(sum_strips<T, decltype(flag)::value>, grid_of(blocks), kThreads, 0, stream,
                      static_cast<const T*>(w_old.data), w_old.row_stride, static_cast<const T*>(w_new.data),
                      w_new.row_stride, w_old.rows, w_old.columns, strips.rows_per_strip, strips.column_blocks,
                      column_parts, scalar_parts);
      });
    });
    if (!summed.ok()) return summed;
  }
  return launch(add_strips, grid_of(finish_blocks), kThreads, 0, stream, column_parts, scalar_parts, w_old.columns,
                strips.count, blocks, result.squared_update, result.inner_product, result.old_squared_norm);
}

}  // namespace hpa::cuda
