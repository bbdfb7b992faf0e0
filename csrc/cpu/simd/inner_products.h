// The first product of routed_lora, x A^T: a register tile of inner products, for whatever multiplies.
//
// Way: Element, Operand (what a vector register holds of a row), kStep (elements in it), read, add_product.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// The tile's rows are given by pointer: at the edges a row is repeated and its result dropped.
template <class Way, int kTokens, int kRows>
HPA_INLINE void inner_product_tile(const typename Way::Element* const (&x)[kTokens],
                                   const typename Way::Element* const (&a)[kRows], std::int64_t in,
                                   float (&result)[kTokens][kRows]) {
  using Operand = typename Way::Operand;
  F32 sum[kTokens][kRows] = {};
  const auto add = [&](const Operand(&left)[kTokens], const Operand(&right)[kRows]) __attribute__((always_inline)) {
    HPA_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      HPA_UNROLL
      for (int r = 0; r < kRows; ++r) sum[t][r] = Way::add_product(left[t], right[r], sum[t][r]);
    }
  };
  Operand left[kTokens], right[kRows];
  std::int64_t k = 0;
  for (; k + Way::kStep <= in; k += Way::kStep) {
    HPA_UNROLL
    for (int r = 0; r < kRows; ++r) right[r] = Way::read(a[r] + k);
    HPA_UNROLL
    for (int t = 0; t < kTokens; ++t) left[t] = Way::read(x[t] + k);
    add(left, right);
  }
  if (k < in) {
    for (int r = 0; r < kRows; ++r) right[r] = Way::read(a[r] + k, in - k);
    for (int t = 0; t < kTokens; ++t) left[t] = Way::read(x[t] + k, in - k);
    add(left, right);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) result[t][r] = sum_lanes(sum[t][r]);
  }
}

template <class Way, int kTokens>
void inner_product_rows(const typename Way::Element* x, std::int64_t tokens, const typename Way::Element* a,
                        std::int64_t rows, std::int64_t in, float* out, std::int64_t out_stride) {
  using Element = typename Way::Element;
  const Element* token[kTokens];
  for (int t = 0; t < kTokens; ++t) token[t] = x + (t < tokens ? t : tokens - 1) * in;
  for (std::int64_t first = 0; first < rows; first += kDotRows) {
    const Element* row[kDotRows];
    for (int r = 0; r < kDotRows; ++r) row[r] = a + (first + r < rows ? first + r : rows - 1) * in;
    float result[kTokens][kDotRows];
    inner_product_tile<Way, kTokens, kDotRows>(token, row, in, result);
    for (int t = 0; t < kTokens && t < tokens; ++t) {
      for (int r = 0; r < kDotRows && first + r < rows; ++r) out[t * out_stride + first + r] = result[t][r];
    }
  }
}

// Fills Kernels::inner_products of one dtype.
template <class Way>
void inner_products(const void* x, std::int64_t tokens, const void* a, std::int64_t rows, std::int64_t in, float* out,
                    std::int64_t out_stride) {
  const auto* token = static_cast<const typename Way::Element*>(x);
  const auto* row = static_cast<const typename Way::Element*>(a);
  for (std::int64_t t = 0; t < tokens; t += kDotTokens) {
    if (tokens - t == 1) {
      inner_product_rows<Way, 1>(token + t * in, 1, row, rows, in, out + t * out_stride, out_stride);
    } else {
      inner_product_rows<Way, kDotTokens>(token + t * in, tokens - t, row, rows, in, out + t * out_stride, out_stride);
    }
  }
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
