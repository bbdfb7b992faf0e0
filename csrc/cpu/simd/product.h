// The register tile shared by gram, inverse_diagonal and routed_lora.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// sum[i][v] = sum over k < depth of a[k * k_stride + i * row_stride] * b[k * kPanel + v * lanes ...]: the sum of one
// call stays in registers, each element in order of k.
template <typename T, int kRows, int kVectors>
HPA_INLINE void product_tile(std::int64_t depth, const T* a, std::int64_t k_stride, std::int64_t row_stride, const T* b,
                             Vector<T> (&sum)[kRows][kVectors]) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  HPA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    HPA_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<T>{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector<T> right[kVectors];
    HPA_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_vector<Vector<T>>(b + v * kWidth);
    HPA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vector<T> left = broadcast(a[i * row_stride]);
      HPA_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
    a += k_stride;
    b += kPanel;
  }
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
