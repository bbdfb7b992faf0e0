// Vectors of the native width of the instruction set that this translation unit is compiled for.
//
// Arithmetic is the compiler's vector extension (GCC and Clang); only what it cannot express is an intrinsic.
// HPA_ISA names the namespace. Everything is in an anonymous namespace and always inlined, so that nothing compiled
// for one instruction set can be merged by the linker with the same thing compiled for another.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__GNUC__)
#error "the CPU kernels use GCC vector extensions: compile them with GCC or Clang"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define HPA_INLINE [[gnu::always_inline]] inline
#if defined(__clang__)
#define HPA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define HPA_UNROLL _Pragma("GCC unroll 48")
#endif

namespace hpa::cpu::HPA_ISA {
namespace {

// kTileRows x kTileVectors accumulators fill the register file of each instruction set; both divide a panel.
// kDotTokens x kDotRows is the same for inner products, where every accumulator is a whole vector.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8, kTileVectors = 3, kDotTokens = 4, kDotRows = 6;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2, kDotTokens = 3, kDotRows = 3;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8, kTileVectors = 3, kDotTokens = 4, kDotRows = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4, kTileVectors = 2, kDotTokens = 2, kDotRows = 4;
#endif
constexpr int kLanes = kVectorBytes / 4;  // of float32

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef std::int16_t I16 __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint8_t U8 __attribute__((vector_size(kVectorBytes / 4)));

// Four lanes on any instruction set, for transposing.
typedef float F32x4 __attribute__((vector_size(16)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = F32;
};
template <>
struct VectorOf<double> {
  using Type = F64;
};
template <typename T>
using Vector = typename VectorOf<T>::Type;

HPA_INLINE F32 broadcast(float value) { return value - F32{}; }
HPA_INLINE F64 broadcast(double value) { return value - F64{}; }

template <typename V, typename T>
HPA_INLINE V load_vector(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
HPA_INLINE void store_vector(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// a * b + c; fused wherever the instruction set has it.
HPA_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
HPA_INLINE F64 multiply_add(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

HPA_INLINE U32 select(I32 condition, U32 yes, U32 no) { return ((U32)condition & yes) | (~(U32)condition & no); }

// Lanes are added in pairs, in an order that depends on the width alone.
HPA_INLINE float sum_lanes(F32 v) {
  float lanes[kLanes];
  store_vector(lanes, v);
  HPA_UNROLL
  for (int width = kLanes / 2; width > 0; width /= 2) {
    HPA_UNROLL
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

HPA_INLINE void transpose(F32x4& a, F32x4& b, F32x4& c, F32x4& d) {
#if defined(__clang__) || __GNUC__ >= 12
  const F32x4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const F32x4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
#else
  const F32x4 rows[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) a[i] = rows[i][0], b[i] = rows[i][1], c[i] = rows[i][2], d[i] = rows[i][3];
#endif
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
