// project_merge: out = M * w_old + (1 - M) * (w_new - c * w_old), HPA (CVPR 2026) section 3.3, in one pass.
// A thread owns eight neighbouring columns, so 16 bytes of a 16-bit dtype, and has kInFlight rows of both weights under
// way before it uses the first. Emulated on the CPU only; not yet run on a GPU (docs/kernels.md).
#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "hpa/project_merge.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockColumns = kWarp * 8;
constexpr int kRowLanes = kThreads / kWarp;

// No __restrict__ and no read-only loads: out may be w_old or w_new. Each thread reads its elements before it writes
// them, and no other thread touches them.
template <class T, bool kVectorized>
__global__ void __launch_bounds__(kThreads)
    merge(const T* w_old, std::int64_t old_stride,   // [rows, columns]
          const T* w_new, std::int64_t new_stride,   // [rows, columns]
          const std::uint8_t* mask, bool mask_rows,  // [columns], or [rows] where mask_rows
          const float* coefficient,                  // []
          T* out, std::int64_t out_stride,           // [rows, columns]
          std::int64_t rows, std::int64_t columns, std::int64_t column_blocks) {
  constexpr int kInFlight = kRowsInFlight<T, kVectorized>;
  constexpr int kBlockRows = kRowLanes * kInFlight;
  const std::int64_t column_block = blockIdx.x % column_blocks;
  const std::int64_t first = column_block * kBlockColumns + static_cast<int>(threadIdx.x % kWarp) * 8;
  const int count = eight_count(first, columns);
  if (count == 0) return;
  const float c = *coefficient;

  unsigned retained = 0;  // a bit per column
  if (!mask_rows) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count && mask[first + i] != 0) retained |= 1u << i;
    }
  }

  const std::int64_t step = (gridDim.x / column_blocks) * kBlockRows;
  for (std::int64_t base = blockIdx.x / column_blocks * kBlockRows + threadIdx.x / kWarp; base < rows; base += step) {
    Eight<T> old_values[kInFlight], new_values[kInFlight];
    unsigned keep[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t row = base + u * kRowLanes;
      keep[u] = retained;
      if (row < rows) {
        old_values[u] = load_eight<kVectorized>(w_old + row * old_stride + first, count);
        new_values[u] = load_eight<kVectorized>(w_new + row * new_stride + first, count);
        if (mask_rows && mask[row] != 0) keep[u] = 0xffu;
      } else {
        old_values[u] = new_values[u] = zero_eight<T>();
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t row = base + u * kRowLanes;
      if (row >= rows) continue;
      float adjusted[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Two roundings, not one fused, as the CPU and torch compute it.
        adjusted[i] = __fsub_rn(new_values[u].value(i), __fmul_rn(c, old_values[u].value(i)));
      }
      const Eight<T> merged = Eight<T>::choose(keep[u], old_values[u], adjusted);
      store_eight<kVectorized>(out + row * out_stride + first, count, merged);
    }
  }
}

}  // namespace

Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_project_merge(w_old, w_new, mask, axis, coefficient, out));
  if (is_empty(out)) return {};
  const bool vectorized = rows_aligned16(w_old) && rows_aligned16(w_new) && rows_aligned16(out);
  return with_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::int64_t column_blocks = ceil_div<std::int64_t>(out.columns, kBlockColumns);
    HPA_REQUIRE(column_blocks <= kMaximumGrid, "out: too many columns");
    return with_bool(vectorized, [&](auto flag) {
      constexpr bool kVectorized = decltype(flag)::value;
      const std::int64_t needed = ceil_div<std::int64_t>(out.rows, kRowLanes * kRowsInFlight<T, kVectorized>);
      const std::int64_t row_blocks = smaller(needed, kMaximumGrid / column_blocks);
      return launch(merge<T, kVectorized>, grid_of(column_blocks * row_blocks), kThreads, 0, stream,
                    static_cast<const T*>(w_old.data), w_old.row_stride, static_cast<const T*>(w_new.data),
                    w_new.row_stride, mask, axis == MaskAxis::output, coefficient, static_cast<T*>(out.data),
                    out.row_stride, out.rows, out.columns, column_blocks);
    });
  });
}

}  // namespace hpa::cuda
