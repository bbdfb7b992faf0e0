// Inner loops of routed_lora: x A^T as inner products, and (x A^T) B^T as a panel product.
#include "cpu/simd/convert.h"
#include "cpu/simd/inner_products.h"
#include "cpu/simd/product.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// One value of x and of A in every lane.
template <typename T>
struct Values {
  using Element = T;
  using Operand = F32;
  static constexpr int kStep = kLanes;
  HPA_INLINE static F32 read(const T* p) { return load(p); }
  HPA_INLINE static F32 read(const T* p, std::int64_t count) { return load(p, count); }
  HPA_INLINE static F32 add_product(F32 x, F32 a, F32 sum) { return multiply_add(x, a, sum); }
};

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

// The sum is rounded before it is added, as if it had been written and read again.
template <typename T>
HPA_INLINE Stored<T> added(F32 sum, Stored<T> onto, const T* type) {
  return narrow(widen(onto, type) + widen(narrow(sum, type), type), type);
}

template <typename T, int kRows, int kVectors>
HPA_INLINE void expand_tile(const float* mid, std::int64_t mid_stride, std::int64_t depth, const float* b,
                            const T* onto, T* out, std::int64_t out_stride, std::int64_t columns) {
  // Rows of the output lie far apart: fetched while the tile is summed, so that its stores do not wait for memory.
  HPA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const std::int64_t last = (columns < kVectors * kLanes ? columns : kVectors * kLanes) - 1;
    __builtin_prefetch(out + row * out_stride, 1);
    __builtin_prefetch(out + row * out_stride + last, 1);
    if (onto != nullptr) {
      __builtin_prefetch(onto + row * out_stride, 0);
      __builtin_prefetch(onto + row * out_stride + last, 0);
    }
  }
  F32 sum[kRows][kVectors];
  product_tile<float, kRows, kVectors>(depth, mid, 1, mid_stride, b, sum);
  HPA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    HPA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t offset = row * out_stride + v * kLanes, left = columns - v * kLanes;
      if (left >= kLanes) {
        const Stored<T> value =
            onto != nullptr ? added<T>(sum[row][v], load_stored(onto + offset), out) : narrow(sum[row][v], out);
        store_vector(out + offset, value);
      } else if (left > 0) {
        const Stored<T> value =
            onto != nullptr ? added<T>(sum[row][v], load_stored(onto + offset, left), out) : narrow(sum[row][v], out);
        store_stored(out + offset, value, left);
      }
    }
  }
}

template <typename T>
void expand(const float* mid, std::int64_t tokens, std::int64_t mid_stride, std::int64_t depth, const float* b,
            const void* onto, void* out, std::int64_t out_stride, std::int64_t columns) {
  constexpr int kWidth = kTileVectors * kLanes;
  const T* added_to = static_cast<const T*>(onto);
  T* base = static_cast<T*>(out);
  for (std::int64_t j = 0; j < columns; j += kWidth) {
    const auto tile = [&]<int kRows>(std::int64_t t) __attribute__((always_inline)) {
      const std::int64_t offset = t * out_stride + j;
      expand_tile<T, kRows, kTileVectors>(mid + t * mid_stride, mid_stride, depth, b + j,
                                          added_to != nullptr ? added_to + offset : nullptr, base + offset, out_stride,
                                          columns - j);
    };
    std::int64_t t = 0;
    for (; t + kTileRows <= tokens; t += kTileRows) tile.template operator()<kTileRows>(t);
    for (; t < tokens; ++t) tile.template operator()<1>(t);
  }
}

template <typename T>
void fill(Kernels& kernels, int dtype) {
  kernels.inner_products[dtype] = inner_products<Values<T>>;
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
