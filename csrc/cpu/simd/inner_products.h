// The first product of routed_lora, x A^T: a register tile of inner products, for whatever multiplies.
//
// Way: Element, Operand (what a vector register holds of a row), kStep (elements in it), read, add_product.
#pragma once

#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// sum_lanes without the way through memory where that can be said: its order, hence its bits.
HPA_INLINE float add_lanes(F32 v) {
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return sum_lanes(v);
#endif
}

// sum[t][r] += <x[t], a[r]> lane by lane over `steps` vectors, and a shorter one behind them if tail > 0. x and a read
// the operand of their row at a step; the tile's rows repeat at the edges, and what they give is dropped.
template <class Way, int kTokens, int kRows, class ReadX, class ReadA>
HPA_INLINE void add_inner_products(ReadX x, ReadA a, std::int64_t steps, F32 (&sum)[kTokens][kRows]) {
  for (std::int64_t k = 0; k < steps; ++k) {
    typename Way::Operand right[kRows];
    HPA_UNROLL
    for (int r = 0; r < kRows; ++r) right[r] = a(r, k);
    HPA_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const typename Way::Operand left = x(t, k);
      HPA_UNROLL
      for (int r = 0; r < kRows; ++r) sum[t][r] = Way::add_product(left, right[r], sum[t][r]);
    }
  }
}

// Few tokens: rows of A come straight from memory, each once.
template <class Way, int kTokens>
void inner_products_of_few(const typename Way::Element* x, std::int64_t tokens, const typename Way::Element* a,
                           std::int64_t rows, std::int64_t in, float* out, std::int64_t out_stride) {
  using Element = typename Way::Element;
  const Element* token[kTokens];
  for (int t = 0; t < kTokens; ++t) token[t] = x + (t < tokens ? t : tokens - 1) * in;
  const std::int64_t steps = in / Way::kStep, whole = steps * Way::kStep;
  for (std::int64_t first = 0; first < rows; first += kDotRows) {
    const Element* row[kDotRows];
    for (int r = 0; r < kDotRows; ++r) row[r] = a + (first + r < rows ? first + r : rows - 1) * in;
    F32 sum[kTokens][kDotRows] = {};
    add_inner_products<Way>(
        [&](int t, std::int64_t k) __attribute__((always_inline)) { return Way::read(token[t] + k * Way::kStep); },
        [&](int r, std::int64_t k) __attribute__((always_inline)) { return Way::read(row[r] + k * Way::kStep); }, steps,
        sum);
    if (whole < in) {
      add_inner_products<Way>(
          [&](int t, std::int64_t) __attribute__((always_inline)) { return Way::read(token[t] + whole, in - whole); },
          [&](int r, std::int64_t) __attribute__((always_inline)) { return Way::read(row[r] + whole, in - whole); }, 1,
          sum);
    }
    for (int t = 0; t < kTokens && t < tokens; ++t) {
      for (int r = 0; r < kDotRows && first + r < rows; ++r) out[t * out_stride + first + r] = add_lanes(sum[t][r]);
    }
  }
}

// Many tokens: a piece of kDotRows rows of A is laid side by side, stays in the first-level cache while the tokens pass
// by, and the lanes' sums wait in memory for the next piece. Rows of x and A lie a power of two apart, as a rule: read
// in place, they would displace each other from the cache. Each lane adds in the order that few tokens have.
template <class Way>
void inner_products_of_many(const typename Way::Element* x, std::int64_t tokens, const typename Way::Element* a,
                            std::int64_t rows, std::int64_t in, float* out, std::int64_t out_stride) {
  using Element = typename Way::Element;
  using Operand = typename Way::Operand;
  constexpr std::int64_t kTokensAtOnce = 64, kSteps = (16 << 10) / (kDotRows * kVectorBytes);
  constexpr std::int64_t kTiles = kTokensAtOnce / kDotTokens;
  Operand piece[kSteps][kDotRows];
  F32 sums[kTiles][kDotTokens][kDotRows];
  const std::int64_t all_steps = (in + Way::kStep - 1) / Way::kStep;
  for (std::int64_t first_token = 0; first_token < tokens; first_token += kTiles * kDotTokens) {
    const std::int64_t left_tokens = tokens - first_token;
    for (std::int64_t first = 0; first < rows; first += kDotRows) {
      __builtin_memset(sums, 0, sizeof(sums));
      for (std::int64_t step = 0; step < all_steps; step += kSteps) {
        const std::int64_t steps = all_steps - step < kSteps ? all_steps - step : kSteps;
        const std::int64_t begin = step * Way::kStep;
        const std::int64_t tail = in - begin - (steps - 1) * Way::kStep;  // elements of the last step
        for (int r = 0; r < kDotRows; ++r) {
          const Element* row = a + (first + r < rows ? first + r : rows - 1) * in + begin;
          for (std::int64_t k = 0; k + 1 < steps; ++k) piece[k][r] = Way::read(row + k * Way::kStep);
          const Element* last = row + (steps - 1) * Way::kStep;
          piece[steps - 1][r] = tail < Way::kStep ? Way::read(last, tail) : Way::read(last);
        }
        const std::int64_t whole = tail < Way::kStep ? steps - 1 : steps;
        for (std::int64_t tile = 0; tile * kDotTokens < left_tokens && tile < kTiles; ++tile) {
          const Element* token[kDotTokens];
          for (int t = 0; t < kDotTokens; ++t) {
            const std::int64_t own = tile * kDotTokens + t;
            token[t] = x + (first_token + (own < left_tokens ? own : left_tokens - 1)) * in + begin;
          }
          F32 sum[kDotTokens][kDotRows];
          __builtin_memcpy(sum, sums[tile], sizeof(sum));
          const auto of_piece = [&](int r, std::int64_t k) __attribute__((always_inline)) { return piece[k][r]; };
          add_inner_products<Way>([&](int t, std::int64_t k)
                                      __attribute__((always_inline)) { return Way::read(token[t] + k * Way::kStep); },
                                  of_piece, whole, sum);
          if (whole < steps) {
            add_inner_products<Way>(
                [&](int t, std::int64_t)
                    __attribute__((always_inline)) { return Way::read(token[t] + whole * Way::kStep, tail); },
                [&](int r, std::int64_t) __attribute__((always_inline)) { return piece[whole][r]; }, 1, sum);
          }
          __builtin_memcpy(sums[tile], sum, sizeof(sum));
        }
      }
      for (std::int64_t t = 0; t < left_tokens && t < kTiles * kDotTokens; ++t) {
        float* target = out + (first_token + t) * out_stride + first;
        for (int r = 0; r < kDotRows && first + r < rows; ++r) {
          target[r] = add_lanes(sums[t / kDotTokens][t % kDotTokens][r]);
        }
      }
    }
  }
}

// Fills Kernels::inner_products of one dtype.
template <class Way>
void inner_products(const void* x, std::int64_t tokens, const void* a, std::int64_t rows, std::int64_t in, float* out,
                    std::int64_t out_stride) {
  const auto* token = static_cast<const typename Way::Element*>(x);
  const auto* row = static_cast<const typename Way::Element*>(a);
  if (tokens == 1) {
    inner_products_of_few<Way, 1>(token, tokens, row, rows, in, out, out_stride);
  } else if (tokens <= kDotTokens) {
    inner_products_of_few<Way, kDotTokens>(token, tokens, row, rows, in, out, out_stride);
  } else {
    inner_products_of_many<Way>(token, tokens, row, rows, in, out, out_stride);
  }
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
