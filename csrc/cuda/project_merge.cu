// project_merge: out = M * w_old + (1 - M) * (w_new - c * w_old), HPA (CVPR 2026) section 3.3, in one pass, for a list
// of layers in one launch. A thread owns eight neighbouring columns, so 16 bytes of a 16-bit dtype, and has kInFlight
// rows of both weights under way before it uses the first. Emulated on the CPU only; not yet run on a GPU
// (docs/kernels.md).
#include "cuda/check.cuh"
#include "cuda/item_table.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "hpa/project_merge.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockColumns = kWarp * 8;
constexpr int kRowLanes = kThreads / kWarp;
constexpr int kBlockRows = 4 * kRowLanes;

struct Layer {
  const void* w_old;  // [rows, columns]
  const void* w_new;  // [rows, columns]
  void* out;          // [rows, columns]
  std::int64_t old_stride, new_stride, out_stride;
  const std::uint8_t* mask;  // [columns], or [rows] where mask_rows
  const float* coefficient;  // []
  std::int64_t rows, columns;
  std::int32_t column_blocks, row_blocks;
  DType dtype;
  bool vectorized, mask_rows;
};

// What one thread needs for its columns of a layer.
template <class T>
struct Columns {
  const T* w_old;  // at the thread's first column of row 0, as the others
  const T* w_new;
  T* out;
  int count;          // how many of its eight columns exist
  unsigned retained;  // a bit for each
  float coefficient;
};

// kRows rows of a thread's columns, kRowLanes apart. No __restrict__ and no read-only loads: out may be w_old or w_new.
// Each thread reads its elements before it writes them, and no other thread touches them.
template <bool kVectorized, int kRows, class T>
__device__ __forceinline__ void merge_rows(const Layer& layer, const Columns<T>& columns, std::int64_t first) {
  const int count = kVectorized ? 8 : columns.count;
  Eight<T> old_values[kRows], new_values[kRows];
  unsigned keep[kRows];
  // Before the weights: a branch among their loads would keep them from being under way together.
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const bool whole_row = layer.mask_rows && layer.mask[first + u * kRowLanes] != 0;
    keep[u] = whole_row ? 0xffu : columns.retained;
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const std::int64_t row = first + u * kRowLanes;
    old_values[u] = load_eight<kVectorized>(columns.w_old + row * layer.old_stride, count);
    new_values[u] = load_eight<kVectorized>(columns.w_new + row * layer.new_stride, count);
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    float adjusted[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Two roundings, not one fused, as the CPU and torch compute it.
      adjusted[i] = __fsub_rn(new_values[u].value(i), __fmul_rn(columns.coefficient, old_values[u].value(i)));
    }
    const Eight<T> merged = Eight<T>::choose(keep[u], old_values[u], adjusted);
    store_eight<kVectorized>(columns.out + (first + u * kRowLanes) * layer.out_stride, count, merged);
  }
}

template <class T, bool kVectorized>
__device__ __forceinline__ void merge(const Layer& layer, std::int64_t column, int count, std::int64_t row_block) {
  constexpr int kInFlight = kRowsInFlight<T, kVectorized>;
  Columns<T> columns{static_cast<const T*>(layer.w_old) + column,
                     static_cast<const T*>(layer.w_new) + column,
                     static_cast<T*>(layer.out) + column,
                     count,
                     0u,
                     *layer.coefficient};
  if (!layer.mask_rows) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count && layer.mask[column + i] != 0) columns.retained |= 1u << i;
    }
  }
  const std::int64_t rows = layer.rows, step = static_cast<std::int64_t>(layer.row_blocks) * kBlockRows;
  for (std::int64_t base = row_block * kBlockRows; base < rows; base += step) {
    std::int64_t row = base + static_cast<int>(threadIdx.x / kWarp);
    const std::int64_t end = smaller(rows, base + kBlockRows);
    for (; row + (kInFlight - 1) * kRowLanes < end; row += kInFlight * kRowLanes) {
      merge_rows<kVectorized, kInFlight>(layer, columns, row);
    }
    for (; row < end; row += kRowLanes) merge_rows<kVectorized, 1>(layer, columns, row);
  }
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 4) merge_layers(HPA_GRID_CONSTANT(ItemTable<Layer, kItems>) table) {
  const int index = item_of(table, blockIdx.x);
  const Layer& layer = table.items[index];
  const unsigned block = blockIdx.x - table.first_block[index];
  const unsigned column_blocks = static_cast<unsigned>(layer.column_blocks);
  const std::int64_t column =
      static_cast<std::int64_t>(block % column_blocks) * kBlockColumns + static_cast<int>(threadIdx.x % kWarp) * 8;
  const int count = eight_count(column, layer.columns);
  if (count == 0) return;
  in_row_kind(layer.dtype, layer.vectorized && count == 8, [&](auto type, auto flag) {
    merge<typename decltype(type)::type, decltype(flag)::value>(layer, column, count, block / column_blocks);
  });
}

Layer layer_of(const ProjectMergeItem& item) {
  Layer layer{};
  layer.w_old = item.w_old.data, layer.old_stride = item.w_old.row_stride;
  layer.w_new = item.w_new.data, layer.new_stride = item.w_new.row_stride;
  layer.out = item.out.data, layer.out_stride = item.out.row_stride;
  layer.mask = item.mask, layer.mask_rows = item.axis == MaskAxis::output;
  layer.coefficient = item.coefficient;
  layer.rows = item.out.rows, layer.columns = item.out.columns;
  layer.dtype = item.out.dtype;
  layer.vectorized = rows_aligned16(item.w_old) && rows_aligned16(item.w_new) && rows_aligned16(item.out);
  if (is_empty(item.out)) return layer;
  const std::int64_t column_blocks = ceil_div<std::int64_t>(layer.columns, kBlockColumns);
  const std::int64_t needed = ceil_div<std::int64_t>(layer.rows, kBlockRows);
  layer.column_blocks = static_cast<std::int32_t>(column_blocks);
  layer.row_blocks = static_cast<std::int32_t>(smaller(needed, kMaximumGrid / column_blocks));
  return layer;
}

Status check_item(const ProjectMergeItem& item) {
  HPA_RETURN_UNLESS_OK(check_project_merge(item));
  HPA_REQUIRE(ceil_div<std::int64_t>(item.out.columns, kBlockColumns) <= kMaximumGrid, "out: too many columns");
  return {};
}

}  // namespace

Status project_merge_list(const ProjectMergeItem* items, std::int64_t count, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_item));
  Layer layers[kManyItems];
  for (std::int64_t first = 0; first < count; first += kManyItems) {
    const int here = static_cast<int>(smaller<std::int64_t>(kManyItems, count - first));
    for (int i = 0; i < here; ++i) layers[i] = layer_of(items[first + i]);
    HPA_RETURN_UNLESS_OK(launch_items(
        layers, here, [](const Layer& layer) { return std::int64_t{layer.column_blocks} * layer.row_blocks; },
        [&]<int kItems>(const ItemTable<Layer, kItems>& table, dim3 grid) {
          return launch(merge_layers<kItems>, grid, kThreads, 0, stream, table);
        }));
  }
  return {};
}

Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out, Stream stream) {
  const ProjectMergeItem item = {w_old, w_new, mask, axis, coefficient, out};
  return project_merge_list(&item, 1, stream);
}

}  // namespace hpa::cuda
