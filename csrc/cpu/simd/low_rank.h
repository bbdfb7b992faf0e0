// low_rank by register tiles: a tile of B A stays in registers until the weight's elements meet it, so that D is never
// in memory. The product, of float32 or of pairs of bfloat16, is the including file's.
#pragma once

#include "cpu/simd/choose.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

constexpr int kTileWidth = kTileVectors * kLanes;

// The rows of the same tile in the next panel, of which the hardware sees too few bytes at a time to follow them.
template <typename T>
HPA_INLINE void fetch_next(const T* w, std::int64_t stride) {
  HPA_UNROLL
  for (int row = 0; row < kTileRows; ++row) {
    const T* next = w + row * stride + kPanel;
    __builtin_prefetch(next);
    if constexpr (kTileWidth * sizeof(T) > 64) __builtin_prefetch(next + 64 / sizeof(T));
    if constexpr (kTileWidth * sizeof(T) > 128) __builtin_prefetch(next + 128 / sizeof(T));
  }
}

struct ScoreSums {
  F32 inner[kTileVectors], norm[kTileVectors];
};

// kWhole: the tile has all its rows and columns.
template <typename T, bool kWhole>
HPA_INLINE void score_tile(const F32 (&product)[kTileRows][kTileVectors], F32 scaling, const T* w, std::int64_t stride,
                           std::int64_t rows, std::int64_t columns, float* squared_update, ScoreSums& sums) {
  HPA_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const std::int64_t left = columns - v * kLanes;
    if (!kWhole && left <= 0) break;
    const bool whole_vector = kWhole || left >= kLanes;
    float* target = squared_update + v * kLanes;
    F32 squared = whole_vector ? load_vector<F32>(target) : load(target, left);
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      if (!kWhole && row >= rows) break;
      const T* source = w + row * stride + v * kLanes;
      const F32 before = whole_vector ? load(source) : load(source, left);
      const F32 update = scaling * product[row][v];
      squared = multiply_add(update, update, squared);
      sums.inner[v] = multiply_add(update, before, sums.inner[v]);
      sums.norm[v] = multiply_add(before, before, sums.norm[v]);
    }
    if (whole_vector) {
      store_vector(target, squared);
    } else {
      store_stored(target, squared, left);
    }
  }
}

template <typename T, bool kWhole>
HPA_INLINE void merge_tile(const F32 (&product)[kTileRows][kTileVectors], F32 scaling, const T* w, std::int64_t stride,
                           std::int64_t rows, std::int64_t columns, const LowRankMerge& merge, std::int64_t first_row,
                           std::int64_t first_column, T* out) {
  HPA_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const std::int64_t left = columns - v * kLanes, column = first_column + v * kLanes;
    if (!kWhole && left <= 0) break;
    const bool whole_vector = kWhole || left >= kLanes;
    F32 gain = {};
    alignas(kLanes) std::uint8_t keep[kLanes] = {};
    if (!merge.by_row) {
      gain = load_vector<F32>(merge.gain + column);
      if (merge.keep != nullptr) __builtin_memcpy(keep, merge.keep + column, whole_vector ? kLanes : left);
    }
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      if (!kWhole && row >= rows) break;
      const T* source = w + row * stride + v * kLanes;
      T* target = out + row * merge.out_stride + v * kLanes;
      const Stored<T> before = whole_vector ? load_stored(source) : load_stored(source, left);
      if (merge.by_row) gain = broadcast(merge.gain[first_row + row]);
      Stored<T> result = narrow(multiply_add(widen(before, source), gain, scaling * product[row][v]), out);
      if (merge.keep != nullptr) {
        if (!merge.by_row) {
          result = choose(keep, before, result);
        } else if (merge.keep[first_row + row] != 0) {
          result = before;
        }
      }
      if (whole_vector) {
        store_vector(target, result);
      } else {
        store_stored(target, result, left);
      }
    }
  }
}

// Product: a struct whose static tile(depth, left, right, sum) computes a tile from panels of its Element.
template <typename T, typename Product>
void score_block(const LowRankBlock& block, float* squared_update, double* scalars) {
  using Element = typename Product::Element;
  const T* w_old = static_cast<const T*>(block.w_old);
  const F32 scaling = broadcast(block.scaling);
  ScoreSums sums = {};
  for (std::int64_t j = 0; j < block.columns; j += kTileWidth) {
    const std::int64_t columns = block.columns - j;
    for (std::int64_t i = 0; i < block.rows; i += kTileRows) {
      const std::int64_t rows = block.rows - i;
      const T* w = w_old + i * block.old_stride + j;
      fetch_next(w, block.old_stride);
      F32 product[kTileRows][kTileVectors];
      Product::tile(block.depth, static_cast<const Element*>(block.left) + i,
                    static_cast<const Element*>(block.right) + j, product);
      if (rows >= kTileRows && columns >= kTileWidth) {
        score_tile<T, true>(product, scaling, w, block.old_stride, rows, columns, squared_update + j, sums);
      } else {
        score_tile<T, false>(product, scaling, w, block.old_stride, rows, columns, squared_update + j, sums);
      }
    }
  }
  for (int v = 0; v < kTileVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) {
      scalars[0] += static_cast<double>(sums.inner[v][lane]);
      scalars[1] += static_cast<double>(sums.norm[v][lane]);
    }
  }
}

template <typename T, typename Product>
void merge_block(const LowRankBlock& block, const LowRankMerge& merge) {
  using Element = typename Product::Element;
  const T* w_old = static_cast<const T*>(block.w_old);
  const F32 scaling = broadcast(block.scaling);
  for (std::int64_t j = 0; j < block.columns; j += kTileWidth) {
    const std::int64_t columns = block.columns - j;
    for (std::int64_t i = 0; i < block.rows; i += kTileRows) {
      const std::int64_t rows = block.rows - i;
      const T* w = w_old + i * block.old_stride + j;
      T* out = static_cast<T*>(merge.out) + i * merge.out_stride + j;
      fetch_next(w, block.old_stride);
      F32 product[kTileRows][kTileVectors];
      Product::tile(block.depth, static_cast<const Element*>(block.left) + i,
                    static_cast<const Element*>(block.right) + j, product);
      if (rows >= kTileRows && columns >= kTileWidth) {
        merge_tile<T, true>(product, scaling, w, block.old_stride, rows, columns, merge, i, j, out);
      } else {
        merge_tile<T, false>(product, scaling, w, block.old_stride, rows, columns, merge, i, j, out);
      }
    }
  }
}

template <typename T, typename Product>
void fill(LowRankScores& scores, LowRankMerges& merge) {
  scores = score_block<T, Product>;
  merge = merge_block<T, Product>;
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
