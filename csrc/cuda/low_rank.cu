// low_rank: the sums and the merge of HPA for D = scaling * B A, each tile of D in registers alone; the weight is read
// once and the result written once. low_rank_tile.cuh has the products. Emulated on the CPU only; not yet run on a GPU
// (docs/kernels.md).
#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/low_rank_tile.cuh"
#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "hpa/low_rank.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = kLowRankThreads;
constexpr int kTile = kLowRankTile;
constexpr int kFinishColumns = 32;
constexpr int kFinishLanes = kThreads / kFinishColumns;

// What a kernel needs of shared memory: stages of the product, and later its column sums.
template <class Product>
constexpr int kScoreBytes = larger<int>(Product::kSharedBytes, Product::kRowGroups * kTile * 4);

// Whose eight neighbouring columns a thread has in a segment.
template <class Product>
__device__ __forceinline__ int group_of(int segment) {
  return segment / (kSegments / Product::kColumnGroups);
}

template <class W, class Product, bool kVectorized>
__global__ void __launch_bounds__(kThreads, kVectorized ? 2 : 1)
    sum_tiles(const W* w_old, std::int64_t old_stride,  // [rows, columns]
              LowRankFactors factors, float scaling, std::int64_t column_blocks,
              float* column_parts,     // [strips, columns]
              float2* scalar_parts) {  // [strips, column_blocks]
  HPA_SHARED(shared, uint4[kScoreBytes<Product> / 16]);
  HPA_SHARED(inner_scratch, float[kThreads / kWarp]);
  HPA_SHARED(norm_scratch, float[kThreads / kWarp]);
  const std::int64_t strip = blockIdx.x / column_blocks;
  const std::int64_t first_row = strip * kTile, first_column = blockIdx.x % column_blocks * kTile;
  float values[kSegments][8];
  Product::compute(factors, first_row, first_column, reinterpret_cast<unsigned char*>(&shared[0]), values);

  // Rows and columns outside the weight have zeros for D and for the weight.
  float (*const sums)[kTile] = reinterpret_cast<float (*)[kTile]>(&shared[0]);  // [kRowGroups]
  float inner = 0.0f, norm = 0.0f;
#pragma unroll
  for (int group = 0; group < Product::kColumnGroups; ++group) {
    const std::int64_t column = first_column + Product::column(group);
    const int count = eight_count(column, factors.columns);
    float squared[8] = {};
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      if (group_of<Product>(segment) != group) continue;
      const std::int64_t row = first_row + Product::row(segment);
      const int here = row < factors.rows ? count : 0;
      const Eight<W> before = load_eight<kVectorized>(w_old + (here > 0 ? row * old_stride + column : 0), here);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float update = scaling * values[segment][i], old_value = before.value(i);
        squared[i] += update * update;
        inner += update * old_value;
        norm += old_value * old_value;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[Product::row_group()][Product::column(group) + i] = squared[i];
  }
  const float block_inner = block_sum<kThreads>(inner, inner_scratch);
  const float block_norm = block_sum<kThreads>(norm, norm_scratch);  // its barriers also publish sums
  if (threadIdx.x == 0) scalar_parts[blockIdx.x] = make_float2(block_inner, block_norm);
  const std::int64_t column = first_column + threadIdx.x;
  if (threadIdx.x < kTile && column < factors.columns) {
    float total = 0.0f;
#pragma unroll
    for (int group = 0; group < Product::kRowGroups; ++group) total += sums[group][threadIdx.x];
    column_parts[strip * factors.columns + column] = total;
  }
}

// In float64 and in order: blocks of 32 columns, and one block more for the two scalars.
__global__ void __launch_bounds__(kThreads)
    add_tiles(const float* column_parts, const float2* scalar_parts, std::int64_t columns, std::int64_t strips,
              std::int64_t scalar_count, ColumnScores result) {
  HPA_SHARED(totals, double[kFinishLanes][kFinishColumns]);
  HPA_SHARED(inner_scratch, double[kThreads / kWarp]);
  HPA_SHARED(norm_scratch, double[kThreads / kWarp]);
  if (blockIdx.x == gridDim.x - 1) {
    double inner = 0.0, norm = 0.0;
    for (std::int64_t part = threadIdx.x; part < scalar_count; part += kThreads) {
      inner += scalar_parts[part].x;
      norm += scalar_parts[part].y;
    }
    inner = block_sum<kThreads>(inner, inner_scratch);
    norm = block_sum<kThreads>(norm, norm_scratch);
    if (threadIdx.x == 0) {
      *result.inner_product = static_cast<float>(inner);
      *result.old_squared_norm = static_cast<float>(norm);
    }
    return;
  }
  const int lane = threadIdx.x % kFinishColumns, own = threadIdx.x / kFinishColumns;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kFinishColumns + lane;
  double total = 0.0;
  for (std::int64_t strip = own; column < columns && strip < strips; strip += kFinishLanes) {
    total += column_parts[strip * columns + column];
  }
  totals[own][lane] = total;
  __syncthreads();
  if (own == 0 && column < columns) {
    total = 0.0;
#pragma unroll
    for (int other = 0; other < kFinishLanes; ++other) total += totals[other][lane];
    result.squared_update[column] = static_cast<float>(total);
  }
}

// How the old weight is kept: by a mask and c, or by a gain. Along the columns, or the rows where by_row.
struct Keeping {
  const std::uint8_t* mask;  // null: nothing is retained
  const float* coefficient;  // null: gain counts
  const float* gain;         // null: 1
  bool by_row;
};

// No __restrict__ and no read-only loads: out may be w_old. Each thread reads its elements before it writes them, and
// no other thread touches them.
template <class W, class Product, bool kVectorized>
__global__ void __launch_bounds__(kThreads, kVectorized ? 2 : 1)
    merge_tiles(const W* w_old, std::int64_t old_stride, LowRankFactors factors, float scaling, Keeping keeping, W* out,
                std::int64_t out_stride, std::int64_t column_blocks) {
  HPA_SHARED(shared, uint4[Product::kSharedBytes / 16]);
  const std::int64_t first_row = blockIdx.x / column_blocks * kTile;
  const std::int64_t first_column = blockIdx.x % column_blocks * kTile;
  float values[kSegments][8];
  Product::compute(factors, first_row, first_column, reinterpret_cast<unsigned char*>(&shared[0]), values);

  const float common = keeping.coefficient != nullptr ? 1.0f - *keeping.coefficient : 1.0f;
#pragma unroll
  for (int group = 0; group < Product::kColumnGroups; ++group) {
    const std::int64_t column = first_column + Product::column(group);
    const int count = eight_count(column, factors.columns);
    float gains[8];
    unsigned retained = 0;  // a bit per column
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool here = i < count && !keeping.by_row;
      gains[i] = here && keeping.gain != nullptr ? keeping.gain[column + i] : common;
      if (here && keeping.mask != nullptr && keeping.mask[column + i] != 0) retained |= 1u << i;
    }
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      if (group_of<Product>(segment) != group) continue;
      const std::int64_t row = first_row + Product::row(segment);
      if (row >= factors.rows || count == 0) continue;
      const Eight<W> before = load_eight<kVectorized>(w_old + row * old_stride + column, count);
      const bool row_gain = keeping.by_row && keeping.gain != nullptr;
      const float of_row = row_gain ? keeping.gain[row] : common;
      const unsigned keep = keeping.by_row && keeping.mask != nullptr && keeping.mask[row] != 0 ? 0xffu : retained;
      float merged[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float factor = row_gain ? of_row : gains[i];
        merged[i] = __fmaf_rn(before.value(i), factor, __fmul_rn(scaling, values[segment][i]));
      }
      store_eight<kVectorized>(out + row * out_stride + column, count, Eight<W>::choose(keep, before, merged));
    }
  }
}

LowRankFactors factors_of(const ConstMatrix& w, const LowRankUpdate& update) {
  return {update.a.data,       update.b.data, update.a.dtype, update.b.dtype, update.a.row_stride,
          update.b.row_stride, update.a.rows, w.rows,         w.columns};
}

bool is_vectorized(const ConstMatrix& w, const LowRankUpdate& update) {
  const bool tensor = update.a.dtype == update.b.dtype && update.a.dtype != DType::float32;
  return rows_aligned16(w) && (!tensor || (rows_aligned16(update.a) && rows_aligned16(update.b) &&
                                           update.a.columns % 8 == 0 && update.a.rows % 8 == 0));
}

// Calls function(TypeTag<weight>, TypeTag<product>, BoolTag<vectorized>).
template <class Function>
Status with_product(DType w_dtype, const LowRankUpdate& update, bool vectorized, Function&& function) {
  return with_dtype(w_dtype, [&](auto w) {
    return with_bool(vectorized, [&](auto flag) {
      constexpr bool kVectorized = decltype(flag)::value;
      if (update.a.dtype == update.b.dtype && update.a.dtype == DType::bfloat16) {
        return function(w, TypeTag<TensorProduct<BFloat16, kVectorized>>{}, flag);
      }
      if (update.a.dtype == update.b.dtype && update.a.dtype == DType::float16) {
        return function(w, TypeTag<TensorProduct<Float16, kVectorized>>{}, flag);
      }
      return function(w, TypeTag<FloatProduct>{}, flag);
    });
  });
}

struct Blocks {
  std::int64_t strips, columns;
  std::int64_t count() const { return strips * columns; }
};

Blocks blocks_of(std::int64_t rows, std::int64_t columns) {
  if (rows == 0 || columns == 0) return {0, 0};
  return {ceil_div<std::int64_t>(rows, kTile), ceil_div<std::int64_t>(columns, kTile)};
}

Status merge(const ConstMatrix& w, const LowRankUpdate& update, const Keeping& keeping, const Matrix& out,
             Stream stream) {
  const Blocks blocks = blocks_of(w.rows, w.columns);
  HPA_REQUIRE(blocks.strips <= kMaximumGrid / blocks.columns, "out: is too large");
  const bool vectorized = is_vectorized(w, update) && rows_aligned16(out);
  return with_product(w.dtype, update, vectorized, [&](auto type, auto product, auto flag) {
    using W = typename decltype(type)::type;
    return launch(merge_tiles<W, typename decltype(product)::type, decltype(flag)::value>, grid_of(blocks.count()),
                  kThreads, 0, stream, static_cast<const W*>(w.data), w.row_stride, factors_of(w, update),
                  update.scaling, keeping, static_cast<W*>(out.data), out.row_stride, blocks.columns);
  });
}

}  // namespace

std::size_t low_rank_scores_workspace_bytes(std::int64_t rows, std::int64_t columns) {
  if (rows <= 0 || columns <= 0) return 0;
  const Blocks blocks = blocks_of(rows, columns);
  // The scalars come first, so that both parts are aligned.
  return static_cast<std::size_t>(blocks.count() * 2 + blocks.strips * columns) * sizeof(float);
}

Status low_rank_scores(ConstMatrix w_old, LowRankUpdate update, ColumnScores result, void* workspace, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_low_rank_scores(w_old, update, result));
  const Blocks blocks = blocks_of(w_old.rows, w_old.columns);
  const std::int64_t finish_blocks = ceil_div<std::int64_t>(w_old.columns, kFinishColumns) + 1;
  HPA_REQUIRE(blocks.strips <= kMaximumGrid / larger<std::int64_t>(blocks.columns, 1) && finish_blocks <= kMaximumGrid,
              "w_old: is too large");
  if (blocks.count() > 0) HPA_REQUIRE_WORKSPACE(workspace);
  float2* const scalar_parts = static_cast<float2*>(workspace);
  float* const column_parts = blocks.count() > 0 ? static_cast<float*>(workspace) + 2 * blocks.count() : nullptr;
  if (blocks.count() > 0) {
    const bool vectorized = is_vectorized(w_old, update);
    const Status summed = with_product(w_old.dtype, update, vectorized, [&](auto type, auto product, auto flag) {
      using W = typename decltype(type)::type;
      return launch(sum_tiles<W, typename decltype(product)::type, decltype(flag)::value>, grid_of(blocks.count()),
                    kThreads, 0, stream, static_cast<const W*>(w_old.data), w_old.row_stride, factors_of(w_old, update),
                    update.scaling, blocks.columns, column_parts, scalar_parts);
    });
    if (!summed.ok()) return summed;
  }
  return launch(add_tiles, grid_of(finish_blocks), kThreads, 0, stream, column_parts, scalar_parts, w_old.columns,
                blocks.strips, blocks.count(), result);
}

Status low_rank_merge(ConstMatrix w_old, LowRankUpdate update, const std::uint8_t* mask, MaskAxis axis,
                      const float* coefficient, Matrix out, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_low_rank_merge(w_old, update, mask, axis, coefficient, out));
  if (is_empty(out)) return {};
  return merge(w_old, update, {mask, coefficient, nullptr, axis == MaskAxis::output}, out, stream);
}

Status low_rank_add(ConstMatrix w, LowRankUpdate update, const float* gain, MaskAxis axis, Matrix out, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_low_rank_add(w, update, axis, out));
  if (is_empty(out)) return {};
  return merge(w, update, {nullptr, nullptr, gain, axis == MaskAxis::output}, out, stream);
}

}  // namespace hpa::cuda
