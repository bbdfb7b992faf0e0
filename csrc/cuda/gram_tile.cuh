// What the gram kernels share: the cut of the work into tiles of 128 x 128 outputs and splits of the tokens, and how a
// tile's sums leave the registers. A Tile tells, for this thread's elements by number, where the first lies in the tile
// and how far from it the others.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace hpa::cuda {

constexpr int kTile = 128;
constexpr int kTileElements = kTile * kTile;
// Tensor cores truncate into their accumulator, so sums leave the registers at least this often.
#ifndef HPA_GRAM_FLUSH_TOKENS  // the emulation tests lower it, to come by several flushes
#define HPA_GRAM_FLUSH_TOKENS 8192
#endif
constexpr std::int64_t kFlushTokens = HPA_GRAM_FLUSH_TOKENS;
static_assert(kFlushTokens % 64 == 0, "whole stages");
// Two tiles at work on each of 132 multiprocessors; a constant, so that results do not depend on the device.
constexpr std::int64_t kTargetTiles = 264;
constexpr std::int64_t kLeastSplitTokens = 512;
constexpr std::int64_t kMaximumColumns = std::int64_t{1} << 22;

inline std::int64_t tiles_of(std::int64_t columns) {
  const std::int64_t side = ceil_div<std::int64_t>(columns, kTile);
  return side * (side + 1) / 2;
}

// Over how many splits the tokens should go, from the sizes alone; 1 where there are tiles enough.
inline std::int64_t wanted_splits(std::int64_t tiles, std::int64_t tokens) {
  if (tiles == 0 || tiles > kTargetTiles / 2) return 1;
  return larger<std::int64_t>(smaller(ceil_div(kTargetTiles, tiles), tokens / kLeastSplitTokens), 1);
}

inline std::size_t part_bytes(std::int64_t splits, std::int64_t tiles) {
  return splits <= 1 ? 0 : static_cast<std::size_t>(splits * tiles) * kTileElements * sizeof(float);
}

// Adds the partial tiles [splits, tiles, 128, 128] to gram [in, in], split after split (gram.cu).
Status add_gram_parts(const float* parts, std::int64_t splits, std::int64_t tiles, float* gram,
                      std::int64_t gram_stride, std::int64_t in, Stream stream);

// Adds a tile to G at both places; a tile on the diagonal gives its lower triangle alone, so that G stays symmetric.
// A group of elements is read before the first of it is written: the compiler may not move a read over a write, and
// one by one they would each wait for memory.
template <class Tile>
__device__ __forceinline__ void add_to_gram(const Tile& tile, float* gram, std::int64_t stride, std::int64_t in,
                                            std::int64_t tile_row, std::int64_t tile_column) {
  constexpr int kGroup = Tile::kGroup;
  const std::int64_t row = tile_row + Tile::first_row(), column = tile_column + Tile::first_column();
  float* const lower = gram + row * stride + column;
  float* const upper = gram + column * stride + row;
  const int rows_left = static_cast<int>(smaller<std::int64_t>(in - row, kTile));
  const int below = static_cast<int>(row - column);  // how far the thread's first element lies below the diagonal
#pragma unroll
  for (int start = 0; start < Tile::kElements; start += kGroup) {
    float lower_values[kGroup], upper_values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int r = Tile::row_offset(start + i), c = Tile::column_offset(start + i);
      const bool inside = r < rows_left;
      lower_values[i] = inside && c - r <= below ? lower[r * stride + c] : 0.0f;
      upper_values[i] = inside && c - r < below ? upper[c * stride + r] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int r = Tile::row_offset(start + i), c = Tile::column_offset(start + i);
      const bool inside = r < rows_left;
      if (inside && c - r <= below) lower[r * stride + c] = lower_values[i] + tile.value_of(start + i);
      if (inside && c - r < below) upper[c * stride + r] = upper_values[i] + tile.value_of(start + i);
    }
  }
}

// To tile number `part` of the partial tiles; `fresh` where nothing stands there yet.
template <class Tile>
__device__ __forceinline__ void add_to_part(const Tile& tile, float* parts, std::int64_t part, bool fresh) {
  constexpr int kGroup = Tile::kGroup;
  // Hidden, so that no address is kept in a register beside the sums: they are constants from here on.
  float* const own = parts + ptx::opaque(part * kTileElements + Tile::first_row() * kTile + Tile::first_column());
#pragma unroll
  for (int start = 0; start < Tile::kElements; start += kGroup) {
    float before[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      before[i] = fresh ? 0.0f : own[Tile::row_offset(start + i) * kTile + Tile::column_offset(start + i)];
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      own[Tile::row_offset(start + i) * kTile + Tile::column_offset(start + i)] = before[i] + tile.value_of(start + i);
    }
  }
}

}  // namespace hpa::cuda
