// column_scores: sum_i D_ij^2 per column, <D, w_old> and ||w_old||^2 with D = w_new - w_old, both weights read once
// (HPA sections 3.1, 3.3), for a list of layers in two launches. A matrix is cut into strips of rows; a block sums 256
// columns of a strip, a second kernel adds the strips in float64 in a fixed order. Emulated on the CPU only; not yet
// run on a GPU (docs/kernels.md).
#include <type_traits>

#include "cuda/check.cuh"
#include "cuda/item_table.cuh"
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

struct Layer {
  const void* w_old;  // [rows, columns]
  const void* w_new;  // [rows, columns]
  std::int64_t old_stride, new_stride, rows, columns;
  float* column_parts;   // [strips, columns]
  float2* scalar_parts;  // [strips, column_blocks]
  ColumnScores result;
  std::int32_t rows_per_strip, column_blocks, strips;
  DType dtype;
  bool vectorized;
};

// What a thread has summed over its rows: squares of its eight columns, and its share of the two scalars.
struct Sums {
  float squares[8];
  float inner, norm;
};

// kRows rows of a thread's eight columns, kRowLanes apart; all loads are under way before the first is used.
template <bool kVectorized, int kRows, class T>
__device__ __forceinline__ void add_rows(const T* w_old, std::int64_t old_stride, const T* w_new,
                                         std::int64_t new_stride, int count, Sums& sums) {
  Eight<T> old_values[kRows], new_values[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    old_values[u] = load_eight<kVectorized>(w_old + u * kRowLanes * old_stride, kVectorized ? 8 : count);
    new_values[u] = load_eight<kVectorized>(w_new + u * kRowLanes * new_stride, kVectorized ? 8 : count);
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float old_value = old_values[u].value(i);
      const float update = new_values[u].value(i) - old_value;
      sums.squares[i] += update * update;
      sums.inner += update * old_value;
      sums.norm += old_value * old_value;
    }
  }
}

// The order of the additions is the same for every T and kVectorized.
template <class T, bool kVectorized>
__device__ __forceinline__ void sum_rows(const Layer& layer, std::int64_t strip, std::int64_t column, int count,
                                         Sums& sums) {
  constexpr int kInFlight = kRowsInFlight<T, kVectorized>;
  const T* const w_old = static_cast<const T*>(layer.w_old) + column;
  const T* const w_new = static_cast<const T*>(layer.w_new) + column;
  const std::int64_t end = smaller(layer.rows, (strip + 1) * layer.rows_per_strip);
  std::int64_t row = strip * layer.rows_per_strip + static_cast<int>(threadIdx.x / kWarp);
  const auto add = [&](auto rows) {
    add_rows<kVectorized, decltype(rows)::value>(w_old + row * layer.old_stride, layer.old_stride,
                                                 w_new + row * layer.new_stride, layer.new_stride, count, sums);
    row += decltype(rows)::value * kRowLanes;
  };
  while (row + (kInFlight - 1) * kRowLanes < end) add(std::integral_constant<int, kInFlight>{});
  while (row < end) add(std::integral_constant<int, 1>{});
}

template <int kItems>
__global__ void __launch_bounds__(kThreads) sum_strips(HPA_GRID_CONSTANT(ItemTable<Layer, kItems>) table) {
  HPA_SHARED(lane_sums, float[kRowLanes][8][kWarp + 1]);
  HPA_SHARED(inner_scratch, float[kRowLanes]);
  HPA_SHARED(norm_scratch, float[kRowLanes]);
  const int index = item_of(table, blockIdx.x);
  const Layer& layer = table.items[index];
  const unsigned block = blockIdx.x - table.first_block[index];
  const unsigned column_blocks = static_cast<unsigned>(layer.column_blocks);
  const int lane = threadIdx.x % kWarp;
  const int row_lane = threadIdx.x / kWarp;
  const std::int64_t strip = block / column_blocks;
  const std::int64_t block_first = static_cast<std::int64_t>(block % column_blocks) * kBlockColumns;

  Sums sums{};
  const int count = eight_count(block_first + lane * 8, layer.columns);
  if (count > 0) {
    in_row_kind(layer.dtype, layer.vectorized && count == 8, [&](auto type, auto flag) {
      sum_rows<typename decltype(type)::type, decltype(flag)::value>(layer, strip, block_first + lane * 8, count, sums);
    });
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) lane_sums[row_lane][i][lane] = sums.squares[i];
  const float block_inner = block_sum<kThreads>(sums.inner, inner_scratch);
  const float block_norm = block_sum<kThreads>(sums.norm, norm_scratch);  // its barriers also publish lane_sums
  if (threadIdx.x == 0) layer.scalar_parts[block] = make_float2(block_inner, block_norm);
  const std::int64_t column = block_first + threadIdx.x;
  if (column < layer.columns) {
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowLanes; ++r) total += lane_sums[r][threadIdx.x % 8][threadIdx.x / 8];
    layer.column_parts[strip * layer.columns + column] = total;
  }
}

__host__ __device__ inline std::int64_t finish_blocks(const Layer& layer) {
  return ceil_div<std::int64_t>(layer.columns, kFinishColumns) + 1;
}

// Of each layer, blocks of 32 columns, and one block more for the two scalars.
template <int kItems>
__global__ void __launch_bounds__(kThreads) add_strips(HPA_GRID_CONSTANT(ItemTable<Layer, kItems>) table) {
  HPA_SHARED(lane_totals, double[kRowLanes][kFinishColumns]);
  HPA_SHARED(inner_scratch, double[kRowLanes]);
  HPA_SHARED(norm_scratch, double[kRowLanes]);
  const int index = item_of(table, blockIdx.x);
  const Layer& layer = table.items[index];
  const std::int64_t block = blockIdx.x - table.first_block[index];
  const std::int64_t columns = layer.columns, strips = layer.strips;
  if (block == finish_blocks(layer) - 1) {
    const std::int64_t scalar_count = strips * layer.column_blocks;
    double inner = 0.0, norm = 0.0;
    for (std::int64_t part = threadIdx.x; part < scalar_count; part += kThreads) {
      const float2 values = layer.scalar_parts[part];
      inner += values.x;
      norm += values.y;
    }
    inner = block_sum<kThreads>(inner, inner_scratch);
    norm = block_sum<kThreads>(norm, norm_scratch);
    if (threadIdx.x == 0) {
      *layer.result.inner_product = static_cast<float>(inner);
      *layer.result.old_squared_norm = static_cast<float>(norm);
    }
    return;
  }
  const int lane = threadIdx.x % kFinishColumns;
  const int strip_lane = threadIdx.x / kFinishColumns;
  const std::int64_t column = block * kFinishColumns + lane;
  double total = 0.0;
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t strip = strip_lane; strip < strips; strip += kRowLanes)
      total += layer.column_parts[strip * columns + column];
  }
  lane_totals[strip_lane][lane] = total;
  __syncthreads();
  if (strip_lane == 0 && column < columns) {
    total = 0.0;
#pragma unroll
    for (int r = 0; r < kRowLanes; ++r) total += lane_totals[r][lane];
    layer.result.squared_update[column] = static_cast<float>(total);
  }
}

std::int64_t strip_blocks(const Layer& layer) { return std::int64_t{layer.strips} * layer.column_blocks; }

Layer layer_of(const ColumnScoresItem& item) {
  Layer layer{};
  layer.w_old = item.w_old.data, layer.old_stride = item.w_old.row_stride;
  layer.w_new = item.w_new.data, layer.new_stride = item.w_new.row_stride;
  layer.rows = item.w_old.rows, layer.columns = item.w_old.columns;
  layer.result = item.result;
  const Strips strips = strips_of(layer.rows, layer.columns);
  layer.rows_per_strip = static_cast<std::int32_t>(strips.rows_per_strip);
  layer.column_blocks = static_cast<std::int32_t>(strips.column_blocks);
  layer.strips = static_cast<std::int32_t>(strips.count);
  layer.dtype = item.w_old.dtype;
  layer.vectorized = rows_aligned16(item.w_old) && rows_aligned16(item.w_new);
  return layer;
}

Status check_item(const ColumnScoresItem& item) {
  HPA_RETURN_UNLESS_OK(check_column_scores(item));
  const Strips strips = strips_of(item.w_old.rows, item.w_old.columns);
  HPA_REQUIRE(item.w_old.columns < kMaximumGrid * kFinishColumns && strips.count * strips.column_blocks <= kMaximumGrid,
              "w_old: too many rows or columns");
  return {};
}

// Bytes of a layer's parts, in whole multiples of 16: the scalars come first.
std::size_t part_bytes(std::int64_t rows, std::int64_t columns) {
  if (rows <= 0 || columns <= 0) return 0;
  const Strips strips = strips_of(rows, columns);
  const std::int64_t floats = strips.count * (strips.column_blocks * 2 + columns);
  return static_cast<std::size_t>(round_up<std::int64_t>(floats, 4)) * sizeof(float);
}

Status score_group(Layer* layers, int count, void* workspace, Stream stream) {
  char* place = static_cast<char*>(workspace);
  for (int i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    layer.scalar_parts = reinterpret_cast<float2*>(place);
    layer.column_parts = reinterpret_cast<float*>(place) + 2 * strip_blocks(layer);
    place += part_bytes(layer.rows, layer.columns);
  }
  HPA_RETURN_UNLESS_OK(
      launch_items(layers, count, strip_blocks, [&]<int kItems>(const ItemTable<Layer, kItems>& table, dim3 grid) {
        return launch(sum_strips<kItems>, grid, kThreads, 0, stream, table);
      }));
  return launch_items(
      layers, count, [](const Layer& layer) { return finish_blocks(layer); },
      [&]<int kItems>(const ItemTable<Layer, kItems>& table, dim3 grid) {
        return launch(add_strips<kItems>, grid, kThreads, 0, stream, table);
      });
}

}  // namespace

std::size_t column_scores_workspace_bytes(std::int64_t rows, std::int64_t columns) { return part_bytes(rows, columns); }

std::size_t column_scores_list_workspace_bytes(const ColumnScoresItem* items, std::int64_t count) {
  std::size_t most = 0;
  for (std::int64_t first = 0; first < count; first += kManyItems) {
    std::size_t bytes = 0;
    for (std::int64_t i = first; i < smaller<std::int64_t>(count, first + kManyItems); ++i) {
      bytes += part_bytes(items[i].w_old.rows, items[i].w_old.columns);
    }
    most = larger(most, bytes);
  }
  return most;
}

Status column_scores_list(const ColumnScoresItem* items, std::int64_t count, void* workspace, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_item));
  if (column_scores_list_workspace_bytes(items, count) > 0) HPA_REQUIRE_WORKSPACE(workspace);
  Layer layers[kManyItems];
  for (std::int64_t first = 0; first < count; first += kManyItems) {
    const int here = static_cast<int>(smaller<std::int64_t>(kManyItems, count - first));
    for (int i = 0; i < here; ++i) layers[i] = layer_of(items[first + i]);
    HPA_RETURN_UNLESS_OK(score_group(layers, here, workspace, stream));
  }
  return {};
}

Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result, void* workspace, Stream stream) {
  const ColumnScoresItem item = {w_old, w_new, result};
  return column_scores_list(&item, 1, workspace, stream);
}

}  // namespace hpa::cuda
