// Inner loops of routed_lora: x A^T as inner products, and (x A^T) B^T as a panel product.
#include "cpu/simd/convert.h"
#include "cpu/simd/product.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// The tile's rows are given by pointer: at the edges a row is repeated and its result dropped.
template <typename T, int kTokens, int kRows>
HPA_INLINE void inner_product_tile(const T* const (&x)[kTokens], const T* const (&a)[kRows], std::int64_t in,
                                   float (&result)[kTokens][kRows]) {
  F32 sum[kTokens][kRows] = {};
  const auto add = [&](const F32(&left)[kTokens], const F32(&right)[kRows]) __attribute__((always_inline)) {
    HPA_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      HPA_UNROLL
      for (int r = 0; r < kRows; ++r) sum[t][r] = multiply_add(left[t], right[r], sum[t][r]);
    }
  };
  F32 left[kTokens], right[kRows];
  std::int64_t k = 0;
  for (; k + kLanes <= in; k += kLanes) {
    HPA_UNROLL
    for (int r = 0; r < kRows; ++r) right[r] = load(a[r] + k);
    HPA_UNROLL
    for (int t = 0; t < kTokens; ++t) left[t] = load(x[t] + k);
    add(left, right);
  }
  if (k < in) {
    for (int r = 0; r < kRows; ++r) right[r] = load(a[r] + k, in - k);
    for (int t = 0; t < kTokens; ++t) left[t] = load(x[t] + k, in - k);
    add(left, right);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) result[t][r] = sum_lanes(sum[t][r]);
  }
}

template <typename T, int kTokens>
void inner_product_rows(const T* x, std::int64_t tokens, const T* a, std::int64_t rows, std::int64_t in, float* out,
                        std::int64_t out_stride) {
  const T* token[kTokens];
  for (int t = 0; t < kTokens; ++t) token[t] = x + (t < tokens ? t : tokens - 1) * in;
  for (std::int64_t first = 0; first < rows; first += kDotRows) {
    const T* row[kDotRows];
    for (int r = 0; r < kDotRows; ++r) row[r] = a + (first + r < rows ? first + r : rows - 1) * in;
    float result[kTokens][kDotRows];
    inner_product_tile<T, kTokens, kDotRows>(token, row, in, result);
    for (int t = 0; t < kTokens && t < tokens; ++t) {
      for (int r = 0; r < kDotRows && first + r < rows; ++r) out[t * out_stride + first + r] = result[t][r];
    }
  }
}

template <typename T>
void inner_products(const void* x, std::int64_t tokens, const void* a, std::int64_t rows, std::int64_t in, float* out,
                    std::int64_t out_stride) {
  const T* token = static_cast<const T*>(x);
  const T* row = static_cast<const T*>(a);
  for (std::int64_t t = 0; t < tokens; t += kDotTokens) {
    if (tokens - t == 1) {
      inner_product_rows<T, 1>(token + t * in, 1, row, rows, in, out + t * out_stride, out_stride);
    } else {
      inner_product_rows<T, kDotTokens>(token + t * in, tokens - t, row, rows, in, out + t * out_stride, out_stride);
    }
  }
}

constexpr std::int64_t kChunk = 64;  // elements of a row that are widened at once

template <typename T>
void widen_all(const T* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_vector(to + i, load(from + i));
  if (i < count) store_vector(to + i, load(from + i, count - i));
}

// Four rows at a time go to float32 in vectors, and are then transposed in blocks of 4 x 4. Short rows are widened
// together, as the contiguous memory they are: a rank below the vector width costs no partial loads.
template <typename T>
void pack_transposed(const void* b, std::int64_t rows, std::int64_t depth, float* out) {
  const T* base = static_cast<const T*>(b);
  float chunk[4 * kChunk + kLanes] = {};
  for (std::int64_t r = 0; r < kPanel; r += 4) {
    const std::int64_t present = rows - r < 4 ? (rows > r ? rows - r : 0) : 4;
    for (std::int64_t k = 0; k < depth; k += kChunk) {
      const std::int64_t count = depth - k < kChunk ? depth - k : kChunk;
      const std::int64_t stride = depth <= kChunk ? depth : kChunk;
      if (present < 4) __builtin_memset(chunk, 0, sizeof(chunk));
      if (depth <= kChunk) {
        widen_all(base + r * depth, present * depth, chunk);
      } else {
        for (std::int64_t i = 0; i < present; ++i) widen_all(base + (r + i) * depth + k, count, chunk + i * stride);
      }
      for (std::int64_t n = 0; n < count; n += 4) {
        F32x4 block[4];
        HPA_UNROLL
        for (int i = 0; i < 4; ++i) block[i] = load_vector<F32x4>(chunk + i * stride + n);
        transpose(block[0], block[1], block[2], block[3]);
        for (int i = 0; i < 4 && n + i < count; ++i) store_vector(out + (k + n + i) * kPanel + r, block[i]);
      }
    }
  }
}

template <typename T, int kRows, int kVectors>
HPA_INLINE void expand_tile(const float* mid, std::int64_t depth, const float* b, T* out, std::int64_t out_stride,
                            std::int64_t columns) {
  F32 sum[kRows][kVectors];
  product_tile<float, kRows, kVectors>(depth, mid, 1, depth, b, sum);
  HPA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    HPA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      T* target = out + row * out_stride + v * kLanes;
      const std::int64_t left = columns - v * kLanes;
      if (left >= kLanes) {
        store_vector(target, narrow(sum[row][v], out));
      } else if (left > 0) {
        store_stored(target, narrow(sum[row][v], out), left);
      }
    }
  }
}

template <typename T>
void expand(const float* mid, std::int64_t tokens, std::int64_t depth, const float* b, void* out,
            std::int64_t out_stride, std::int64_t columns) {
  constexpr int kWidth = kTileVectors * kLanes;
  T* base = static_cast<T*>(out);
  for (std::int64_t j = 0; j < columns; j += kWidth) {
    std::int64_t t = 0;
    for (; t + kTileRows <= tokens; t += kTileRows) {
      expand_tile<T, kTileRows, kTileVectors>(mid + t * depth, depth, b + j, base + t * out_stride + j, out_stride,
                                              columns - j);
    }
    for (; t < tokens; ++t) {
      expand_tile<T, 1, kTileVectors>(mid + t * depth, depth, b + j, base + t * out_stride + j, out_stride,
                                      columns - j);
    }
  }
}

template <typename T>
void fill(Kernels& kernels, int dtype) {
  kernels.inner_products[dtype] = inner_products<T>;
  kernels.pack_transposed[dtype] = pack_transposed<T>;
  kernels.expand[dtype] = expand<T>;
}

}  // namespace

void fill_routed_lora(Kernels& kernels) {
  fill<float>(kernels, 0);
  fill<Float16>(kernels, 1);
  fill<BFloat16>(kernels, 2);
}

}  // namespace hpa::cpu::HPA_ISA
