// Inner loops of gram: packing tokens into panels, the panel product, and adding a finished block to the Gram.
#include "cpu/simd/convert.h"
#include "cpu/simd/product.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// Lanes [first, first + kLanes) of a row that has `columns` left from `first`; zeros behind its end.
template <typename T>
HPA_INLINE Stored<T> load_row(const T* row, std::int64_t columns) {
  if (columns >= kLanes) return load_stored(row);
  return columns > 0 ? load_stored(row, columns) : Stored<T>{};
}

HPA_INLINE void add_to(float* out, F32 v) { store_vector(out, load_vector<F32>(out) + v); }

template <typename T>
void pack_tokens(const void* x, std::int64_t row_stride, const std::int64_t* tokens, std::int64_t count,
                 std::int64_t first_column, std::int64_t columns, float* out, std::int64_t panel_stride) {
  for (std::int64_t k = 0; k < count; ++k) {
    const T* row = static_cast<const T*>(x) + tokens[k] * row_stride + first_column;
    for (std::int64_t column = 0; column < columns; column += kPanel) {
      float* panel = out + (column / kPanel) * panel_stride + k * kPanel;
      for (std::int64_t lane = 0; lane < kPanel; lane += kLanes) {
        store_vector(panel + lane, widen(load_row(row + column + lane, columns - column - lane), row));
      }
    }
  }
}

void pack_token_pairs(const void* x, std::int64_t row_stride, const std::int64_t* tokens, std::int64_t count,
                      std::int64_t first_column, std::int64_t columns, std::uint32_t* out, std::int64_t panel_stride) {
  const BFloat16* base = static_cast<const BFloat16*>(x) + first_column;
  for (std::int64_t k = 0; k < count; k += 2) {
    const bool paired = k + 1 < count;
    const BFloat16* even = base + tokens[k] * row_stride;
    const BFloat16* odd = paired ? base + tokens[k + 1] * row_stride : even;
    const U32 keep_odd = U32{} + (paired ? 0xffff0000u : 0u);
    for (std::int64_t column = 0; column < columns; column += kPanel) {
      std::uint32_t* panel = out + (column / kPanel) * panel_stride + (k / 2) * kPanel;
      for (std::int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const std::int64_t left = columns - column - lane;
        const U32 low = __builtin_convertvector(load_row(even + column + lane, left), U32);
        const U32 high = __builtin_convertvector(load_row(odd + column + lane, left), U32) << 16;
        store_vector(panel + lane, low | (high & keep_odd));
      }
    }
  }
}

void add_product(std::int64_t depth, const float* a, const float* b, float* c, std::int64_t c_stride) {
  constexpr int kWidth = kTileVectors * kLanes;
  for (std::int64_t j = 0; j < kPanel; j += kWidth) {
    for (std::int64_t i = 0; i < kPanel; i += kTileRows) {
      F32 sum[kTileRows][kTileVectors];
      product_tile<float, kTileRows, kTileVectors>(depth, a + i, kPanel, 1, b + j, sum);
      HPA_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) add_to(c + (i + row) * c_stride + j + v * kLanes, sum[row][v]);
      }
    }
  }
}

void add_block(const float* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns, float* out,
               std::int64_t out_stride) {
  for (std::int64_t i = 0; i < rows; ++i, c += c_stride, out += out_stride) {
    std::int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) add_to(out + j, load_vector<F32>(c + j));
    for (; j < columns; ++j) out[j] += c[j];
  }
}

void add_block_transposed(const float* c, std::int64_t c_stride, std::int64_t rows, std::int64_t columns, float* out,
                          std::int64_t out_stride) {
  const std::int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (std::int64_t j = 0; j < whole_columns; j += 4) {
    for (std::int64_t i = 0; i < whole_rows; i += 4) {
      F32x4 block[4];
      for (int n = 0; n < 4; ++n) block[n] = load_vector<F32x4>(c + (i + n) * c_stride + j);
      transpose(block[0], block[1], block[2], block[3]);
      for (int n = 0; n < 4; ++n) {
        float* row = out + (j + n) * out_stride + i;
        store_vector(row, load_vector<F32x4>(row) + block[n]);
      }
    }
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      out[j * out_stride + i] += c[i * c_stride + j];
    }
  }
}

}  // namespace

void fill_gram(Kernels& kernels) {
  kernels.pack_tokens[0] = pack_tokens<float>;
  kernels.pack_tokens[1] = pack_tokens<Float16>;
  kernels.pack_tokens[2] = pack_tokens<BFloat16>;
  kernels.pack_token_pairs = pack_token_pairs;
  kernels.add_product = add_product;
  kernels.add_pair_product = nullptr;
  kernels.pair_step = 1;
  kernels.arrange_left = nullptr;
  kernels.begin_products = kernels.end_products = nullptr;
  kernels.add_block = add_block;
  kernels.add_block_transposed = add_block_transposed;
}

}  // namespace hpa::cpu::HPA_ISA
