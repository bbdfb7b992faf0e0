// Lanes of one vector where a mask of bytes is not zero, of another elsewhere, bit by bit.
#pragma once

#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

#if defined(__AVX512F__)
HPA_INLINE F32 choose(const std::uint8_t* mask, F32 retained, F32 merged) {
  const __m128i keep = load_vector<__m128i>(mask);
  return (F32)_mm512_mask_mov_ps((__m512)merged, _mm_test_epi8_mask(keep, keep), (__m512)retained);
}
HPA_INLINE U16 choose(const std::uint8_t* mask, U16 retained, U16 merged) {
  const __m128i keep = load_vector<__m128i>(mask);
  return (U16)_mm256_mask_mov_epi16((__m256i)merged, _mm_test_epi8_mask(keep, keep), (__m256i)retained);
}
#else
HPA_INLINE F32 choose(const std::uint8_t* mask, F32 retained, F32 merged) {
  const U32 keep = (U32)(__builtin_convertvector(load_vector<U8>(mask), U32) != 0u);
  return (F32)((keep & (U32)retained) | (~keep & (U32)merged));
}
HPA_INLINE U16 choose(const std::uint8_t* mask, U16 retained, U16 merged) {
  const U16 keep = (U16)(__builtin_convertvector(load_vector<U8>(mask), U16) != static_cast<std::uint16_t>(0));
  return (keep & retained) | (~keep & merged);
}
#endif

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
