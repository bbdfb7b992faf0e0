// The order in which gram_sm90.cu takes the tiles of the lower triangle: bands of kBandRows tile rows, column by column
// within a band. The 132 tiles that an H100 works on at a time then need some 12 + 11 panels of x instead of one for
// every column, and the L2 cache holds what they share.
#pragma once

#include <cstdint>

#include "cuda/tile_pipeline.cuh"

namespace hpa::cuda {

constexpr int kBandRows = 12;

// The tile at place `index` of a triangle with `side` rows.
__host__ __device__ inline TilePlace banded_place(std::int64_t index, int side) {
  // Tiles before band b: kBandRows b (kBandRows b + 1) / 2.
  int band = static_cast<int>(sqrtf(2.0f * static_cast<float>(index)) / kBandRows);
  const auto before = [](int b) {
    const std::int64_t rows = static_cast<std::int64_t>(b) * kBandRows;
    return rows * (rows + 1) / 2;
  };
  while (before(band) > index) --band;
  while (before(band + 1) <= index) ++band;
  const int first = band * kBandRows, height = smaller(kBandRows, side - first);
  int left = static_cast<int>(index - before(band));
  if (left < first * height) return {first + left % height, left / height};  // full columns
  left -= first * height;
  int column = 0;  // of the triangle on the diagonal, whose columns are ever shorter
  while (left >= height - column) left -= height - column++;
  return {first + column + left, first + column};
}

}  // namespace hpa::cuda
