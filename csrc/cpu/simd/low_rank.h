// low_rank by register tiles: a tile of B A stays in registers until the weight's elements meet it, so that D is never
// in memory. The product, of float32 or of pairs of bfloat16, is the including file's.
#pragma once

#include "cpu/simd/choose.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

constexpr int kTileWidth = kTileVectors * kLanes;

// Bytes that each row is fetched ahead, as in column_scores.
constexpr std::int64_t kFetchAhead = 512;

template <typename T>
HPA_INLINE void fetch_ahead(const T* w, std::int64_t stride) {
  constexpr std::int64_t kElements = kFetchAhead / static_cast<std::int64_t>(sizeof(T));
  HPA_UNROLL
  for (int row = 0; row < kTileRows; ++row) {
    HPA_UNROLL
    for (int byte = 0; byte < kTileWidth * static_cast<int>(sizeof(T)); byte += 64) {
      __builtin_prefetch(w + row * stride + kElements + byte / static_cast<int>(sizeof(T)));
    }
  }
}

// Calls body(i, j, product) for every register tile of the block, along the rows, as memory is: a tile of D at row i
// and column j.
template <typename T, typename Product, typename Body>
HPA_INLINE void for_each_tile(const LowRankBlock& block, std::int64_t i, std::int64_t first, std::int64_t last,
                              Body&& body) {
  using Element = typename Product::Element;
  const T* w = static_cast<const T*>(block.w_old) + i * block.old_stride;
  const Element* left = static_cast<const Element*>(block.left) + i;
  const Element* right = static_cast<const Element*>(block.right);
  for (std::int64_t j = first; j < last; j += kTileWidth) {
    fetch_ahead(w + j, block.old_stride);
    F32 product[kTileRows][kTileVectors];
    Product::tile(block.depth, left, right + j / kPanel * block.depth * kPanel + j % kPanel, product);
    body(w + j, j, product);
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

// All elements are read before the first is written: rows often lie a multiple of 4 KB apart, and a read from where,
// but for the upper bits of the address, something was just written has to wait.
template <typename T, bool kByRow, bool kWhole>
HPA_INLINE void merge_tile(const F32 (&product)[kTileRows][kTileVectors], F32 scaling, const T* w, std::int64_t stride,
                           std::int64_t rows, std::int64_t columns, const float* gain, const std::uint8_t* keep, T* out,
                           std::int64_t out_stride) {
  Stored<T> result[kTileRows][kTileVectors] = {};
  HPA_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const std::int64_t left = columns - v * kLanes;
    if (!kWhole && left <= 0) break;
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      if (!kWhole && row >= rows) break;
      const T* source = w + row * stride + v * kLanes;
      const Stored<T> before = kWhole || left >= kLanes ? load_stored(source) : load_stored(source, left);
      const F32 factor = kByRow ? broadcast(gain[row]) : load_vector<F32>(gain + v * kLanes);
      const Stored<T> sum = narrow(multiply_add(widen(before, source), factor, scaling * product[row][v]), source);
      if constexpr (kByRow) {
        result[row][v] = keep[row] != 0 ? before : sum;
      } else {
        result[row][v] = choose(keep + v * kLanes, before, sum);
      }
    }
  }
  HPA_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const std::int64_t left = columns - v * kLanes;
    if (!kWhole && left <= 0) break;
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      if (!kWhole && row >= rows) break;
      T* target = out + row * out_stride + v * kLanes;
      if (kWhole || left >= kLanes) {
        store_vector(target, result[row][v]);
      } else {
        store_stored(target, result[row][v], left);
      }
    }
  }
}

// Columns between two additions to float64: longer float32 sums would lose digits.
constexpr std::int64_t kScalarColumns = 16 * kPanel;

// Product: a struct whose static tile(depth, left, right, sum) computes a tile from panels of its Element.
template <typename T, typename Product>
void score_block(const LowRankBlock& block, float* squared_update, double* scalars) {
  const F32 scaling = broadcast(block.scaling);
  for (std::int64_t i = 0; i < block.rows; i += kTileRows) {
    const std::int64_t rows = block.rows - i;
    for (std::int64_t first = 0; first < block.columns; first += kScalarColumns) {
      const std::int64_t last = first + kScalarColumns < block.columns ? first + kScalarColumns : block.columns;
      ScoreSums sums = {};
      for_each_tile<T, Product>(
          block, i, first, last, [&](const T* w, std::int64_t j, const auto& product) __attribute__((always_inline)) {
            const std::int64_t columns = block.columns - j;
            if (rows >= kTileRows && columns >= kTileWidth) {
              score_tile<T, true>(product, scaling, w, block.old_stride, rows, columns, squared_update + j, sums);
            } else {
              score_tile<T, false>(product, scaling, w, block.old_stride, rows, columns, squared_update + j, sums);
            }
          });
      for (int v = 0; v < kTileVectors; ++v) {
        for (int lane = 0; lane < kLanes; ++lane) {
          scalars[0] += static_cast<double>(sums.inner[v][lane]);
          scalars[1] += static_cast<double>(sums.norm[v][lane]);
        }
      }
    }
  }
}

template <typename T, typename Product, bool kByRow>
void merge_rows(const LowRankBlock& block, const LowRankMerge& merge) {
  const F32 scaling = broadcast(block.scaling);
  for (std::int64_t i = 0; i < block.rows; i += kTileRows) {
    const std::int64_t rows = block.rows - i;
    T* out = static_cast<T*>(merge.out) + i * merge.out_stride;
    for_each_tile<T, Product>(block, i, 0, block.columns,
                              [&](const T* w, std::int64_t j, const auto& product) __attribute__((always_inline)) {
                                const std::int64_t columns = block.columns - j, along = kByRow ? i : j;
                                const float* gain = merge.gain + along;
                                const std::uint8_t* keep = merge.keep + along;
                                if (rows >= kTileRows && columns >= kTileWidth) {
                                  merge_tile<T, kByRow, true>(product, scaling, w, block.old_stride, rows, columns,
                                                              gain, keep, out + j, merge.out_stride);
                                } else {
                                  merge_tile<T, kByRow, false>(product, scaling, w, block.old_stride, rows, columns,
                                                               gain, keep, out + j, merge.out_stride);
                                }
                              });
  }
}

template <typename T, typename Product>
void merge_block(const LowRankBlock& block, const LowRankMerge& merge) {
  if (merge.by_row) {
    merge_rows<T, Product, true>(block, merge);
  } else {
    merge_rows<T, Product, false>(block, merge);
  }
}

template <typename T, typename Product>
void fill(LowRankScores& scores, LowRankMerges& merge) {
  scores = score_block<T, Product>;
  merge = merge_block<T, Product>;
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
