// bfloat16 and float16 to float32 and back, a vector at a time.
//
// Rounding is to nearest, ties to even, denormals included, as torch converts: the bits agree with
// tensor.to(dtype) for every number, and NaN stays NaN. vcvtneps2bf16 is not used: it flushes denormals.
#pragma once

#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

HPA_INLINE F32 widen(const F32 v, const float*) { return v; }

HPA_INLINE F32 widen(const U16 v, const BFloat16*) { return (F32)(__builtin_convertvector(v, U32) << 16); }

HPA_INLINE F32 widen(const U16 v, const Float16*) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)v);
#else
  // Exponent and fraction moved into a float32's places are 2^-112 of the value, denormals included; Inf and NaN
  // (largest exponent) get the largest exponent again.
  const U32 wide = __builtin_convertvector(v, U32), magnitude = wide & 0x7fffu;
  const U32 scaled = (U32)((F32)(magnitude << 13) * 0x1p112f);
  const U32 special = (U32)(magnitude >= 0x7c00u) & 0x7f800000u;
  return (F32)(scaled | special | ((wide & 0x8000u) << 16));
#endif
}

HPA_INLINE F32 narrow(F32 v, const float*) { return v; }

HPA_INLINE U16 narrow(F32 v, const BFloat16*) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (U16)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
#else
  const I32 is_nan = (I32)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(select(is_nan, U32{} + 0x7fc0u, rounded), U16);
#endif
}

HPA_INLINE U16 narrow(F32 v, const Float16*) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32 bits = (U32)v, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is denormal: adding 0.5 puts its last place, 2^-24, at the end of the fraction.
  const U32 denormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  const U32 rebiased = magnitude - (112u << 23);
  const U32 normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  U32 result = select((I32)(magnitude < 0x38800000u), denormal, normal);
  result = select((I32)(magnitude >= 0x47800000u), U32{} + 0x7c00u, result);
  result = select((I32)(magnitude > 0x7f800000u), U32{} + 0x7e00u, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), U16);
#endif
}

// The vector that holds kLanes elements of T as they lie in memory.
template <typename T>
struct StoredAs {
  using Type = U16;
};
template <>
struct StoredAs<float> {
  using Type = F32;
};
template <typename T>
using Stored = typename StoredAs<T>::Type;

template <typename T>
HPA_INLINE Stored<T> load_stored(const T* p) {
  return load_vector<Stored<T>>(p);
}
template <typename T>
HPA_INLINE Stored<T> load_stored(const T* p, std::int64_t count) {  // count < kLanes; the other lanes are zero
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<std::size_t>(count) * sizeof(T));
  return load_vector<Stored<T>>(lanes);
}
template <typename T>
HPA_INLINE void store_stored(T* p, Stored<T> v, std::int64_t count) {
  T lanes[kLanes];
  store_vector(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<std::size_t>(count) * sizeof(T));
}

template <typename T>
HPA_INLINE F32 load(const T* p) {
  return widen(load_stored(p), p);
}
template <typename T>
HPA_INLINE F32 load(const T* p, std::int64_t count) {
  return widen(load_stored(p, count), p);
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
