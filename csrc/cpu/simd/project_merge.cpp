// Inner loop of project_merge: one row, M * w_old + (1 - M) * (w_new - c * w_old).
//
// Product and difference are rounded one after the other, as the expression is in torch, so that every instruction
// set writes the same bits; the loop waits for memory in any case.
#include "cpu/simd/choose.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

constexpr std::int64_t kGroup = 2 * kLanes;
constexpr std::int64_t kLine = 64;
// Bytes that each weight is fetched ahead, across the pages' ends, where the hardware stops.
constexpr std::int64_t kFetchAhead = 2048;

typedef std::uint16_t U16x2 __attribute__((vector_size(kVectorBytes)));    // kGroup elements
typedef std::uint8_t U8x2 __attribute__((vector_size(kVectorBytes / 2)));  // their mask bytes

// As choose() of one vector, for kGroup elements.
#if defined(__AVX512F__)
HPA_INLINE U16x2 choose(const std::uint8_t* mask, U16x2 retained, U16x2 merged) {
  const __m256i keep = load_vector<__m256i>(mask);
  return (U16x2)_mm512_mask_mov_epi16((__m512i)merged, _mm256_test_epi8_mask(keep, keep), (__m512i)retained);
}
#else
HPA_INLINE U16x2 choose(const std::uint8_t* mask, U16x2 retained, U16x2 merged) {
  const U16x2 keep = (U16x2)(__builtin_convertvector(load_vector<U8x2>(mask), U16x2) != static_cast<std::uint16_t>(0));
  return (keep & retained) | (~keep & merged);
}
#endif

HPA_INLINE F32 adjusted(F32 before, F32 after, F32 coefficient) { return after - coefficient * before; }

// The upper halves are the bfloat16 that narrow() gives; the lower ones are of no meaning.
HPA_INLINE U32 rounded_above(F32 v) {
  const U32 bits = (U32)v;
#if defined(__AVX512F__)
  const __m512i half = _mm512_mask_blend_epi32(_mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000)),
                                               _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (U32)_mm512_mask_mov_epi32(_mm512_add_epi32((__m512i)bits, half), is_nan, _mm512_set1_epi32(0x7fc00000));
#else
  const U32 rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);
  return select((I32)((bits & 0x7fffffffu) > 0x7f800000u), U32{} + 0x7fc00000u, rounded);
#endif
}

// The upper halves of two vectors, those of `even` first in every pair.
HPA_INLINE U16x2 interleaved(U32 even, U32 odd) {
#if defined(__AVX512F__)
  return (U16x2)_mm512_mask_mov_epi16((__m512i)(even >> 16), 0xaaaaaaaau, (__m512i)odd);
#else
  return (U16x2)((even >> 16) | (odd & 0xffff0000u));
#endif
}

HPA_INLINE U16x2 joined(U16 first, U16 second) {
#if defined(__AVX512F__)
  return (U16x2)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
#elif defined(__AVX2__)
  return (U16x2)_mm256_set_m128i((__m128i)second, (__m128i)first);
#else
  U16x2 result;
  __builtin_memcpy(&result, &first, sizeof(first));
  __builtin_memcpy(reinterpret_cast<char*>(&result) + sizeof(first), &second, sizeof(second));
  return result;
#endif
}

// kGroup elements as they lie in memory.
struct F32Group {
  F32 first, second;
};
template <bool kMasked>
HPA_INLINE F32Group merged(const float* w_old, const float* w_new, const std::uint8_t* mask, F32 coefficient) {
  F32Group result;
  const F32 first = load(w_old), second = load(w_old + kLanes);
  result.first = adjusted(first, load(w_new), coefficient);
  result.second = adjusted(second, load(w_new + kLanes), coefficient);
  if constexpr (kMasked) {
    result.first = choose(mask, first, result.first);
    result.second = choose(mask + kLanes, second, result.second);
  }
  return result;
}
template <bool kMasked>
HPA_INLINE U16x2 merged(const Float16* w_old, const Float16* w_new, const std::uint8_t* mask, F32 coefficient) {
  const U16 first = narrow(adjusted(load(w_old), load(w_new), coefficient), w_old);
  const U16 second = narrow(adjusted(load(w_old + kLanes), load(w_new + kLanes), coefficient), w_old);
  const U16x2 result = joined(first, second);
  if constexpr (!kMasked) return result;
  return choose(mask, load_vector<U16x2>(w_old), result);
}
// Even and odd elements apart: they are widened and put together again by a shift or a mask each.
template <bool kMasked>
HPA_INLINE U16x2 merged(const BFloat16* w_old, const BFloat16* w_new, const std::uint8_t* mask, F32 coefficient) {
  const U32 before = load_vector<U32>(w_old), after = load_vector<U32>(w_new);
  const U32 upper = U32{} + 0xffff0000u;
  const U32 even = rounded_above(adjusted((F32)(before << 16), (F32)(after << 16), coefficient));
  const U32 odd = rounded_above(adjusted((F32)(before & upper), (F32)(after & upper), coefficient));
  const U16x2 result = interleaved(even, odd);
  if constexpr (!kMasked) return result;
  return choose(mask, (U16x2)before, result);
}

HPA_INLINE void put(void* p, F32Group v) {
  store_vector(static_cast<float*>(p), v.first);
  store_vector(static_cast<float*>(p) + kLanes, v.second);
}
HPA_INLINE void put(void* p, U16x2 v) { store_vector(static_cast<std::uint16_t*>(p), v); }

// Stores that bypass the caches, so that a line need not be read before it is written. p lies on a multiple of
// kVectorBytes.
#if defined(__AVX512F__)
HPA_INLINE void stream(void* p, U32 v) { _mm512_stream_si512((__m512i*)p, (__m512i)v); }
#elif defined(__AVX2__)
HPA_INLINE void stream(void* p, U32 v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
#elif defined(__x86_64__)
HPA_INLINE void stream(void* p, U32 v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
#else
HPA_INLINE void stream(void* p, U32 v) { store_vector(static_cast<std::uint32_t*>(p), v); }
#endif
HPA_INLINE void stream(void* p, U16x2 v) { stream(p, (U32)v); }
HPA_INLINE void stream(void* p, F32Group v) {
  stream(p, (U32)v.first);
  stream(static_cast<float*>(p) + kLanes, (U32)v.second);
}

template <typename T>
HPA_INLINE void fetch_ahead(const T* p) {
  const char* ahead = reinterpret_cast<const char*>(p) + kFetchAhead;
  HPA_UNROLL
  for (std::int64_t byte = 0; byte < kGroup * static_cast<std::int64_t>(sizeof(T)); byte += kLine) {
    __builtin_prefetch(ahead + byte);
  }
}

// count < kGroup elements.
template <typename T, bool kMasked>
void merge_part(const T* w_old, const T* w_new, const std::uint8_t* mask, F32 coefficient, T* out, std::int64_t count) {
  T before[kGroup] = {}, after[kGroup] = {}, result[kGroup];
  std::uint8_t keep[kGroup] = {};
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  __builtin_memcpy(before, w_old, bytes);
  __builtin_memcpy(after, w_new, bytes);
  if constexpr (kMasked) __builtin_memcpy(keep, mask, static_cast<std::size_t>(count));
  put(result, merged<kMasked>(before, after, keep, coefficient));
  __builtin_memcpy(out, result, bytes);
}

// Columns [first, last); kStreamed: in whole groups, past the caches.
template <typename T, bool kMasked, bool kStreamed>
HPA_INLINE void merge_columns(const T* w_old, const T* w_new, const std::uint8_t* mask, F32 coefficient, T* out,
                              std::int64_t first, std::int64_t last) {
  std::int64_t j = first;
  for (; j + kGroup <= last; j += kGroup) {
    fetch_ahead(w_old + j);
    fetch_ahead(w_new + j);
    const auto result = merged<kMasked>(w_old + j, w_new + j, kMasked ? mask + j : nullptr, coefficient);
    if constexpr (kStreamed) {
      stream(out + j, result);
    } else {
      put(out + j, result);
    }
  }
  if (j < last) {
    merge_part<T, kMasked>(w_old + j, w_new + j, kMasked ? mask + j : nullptr, coefficient, out + j, last - j);
  }
}

// Only whole lines are streamed: a part of one costs as much as the line.
template <typename T, bool kMasked>
HPA_INLINE void stream_columns(const T* w_old, const T* w_new, const std::uint8_t* mask, F32 coefficient, T* out,
                               std::int64_t columns) {
  constexpr std::int64_t kColumns = kLine / static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t kStep = kColumns > kGroup ? kColumns : kGroup;
  const std::int64_t past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % kLine / sizeof(T));
  const std::int64_t head = past == 0 ? 0 : kColumns - past;
  const std::int64_t first = head < columns ? head : columns;
  const std::int64_t last = first + (columns - first) / kStep * kStep;
  merge_columns<T, kMasked, false>(w_old, w_new, mask, coefficient, out, 0, first);
  merge_columns<T, kMasked, true>(w_old, w_new, mask, coefficient, out, first, last);
  merge_columns<T, kMasked, false>(w_old, w_new, mask, coefficient, out, last, columns);
}

// An out whose elements do not lie on multiples of their size has no whole lines.
template <typename T>
HPA_INLINE bool has_lines(const T* out) {
  return reinterpret_cast<std::uintptr_t>(out) % sizeof(T) == 0;
}

template <typename T>
void merge_row(const void* w_old, const void* w_new, const std::uint8_t* mask, float coefficient, void* out,
               std::int64_t columns, bool streamed) {
  const T* before = static_cast<const T*>(w_old);
  const T* after = static_cast<const T*>(w_new);
  T* result = static_cast<T*>(out);
  const F32 factor = broadcast(coefficient);
  if (streamed && has_lines(result)) {
    if (mask != nullptr) {
      stream_columns<T, true>(before, after, mask, factor, result, columns);
    } else {
      stream_columns<T, false>(before, after, mask, factor, result, columns);
    }
  } else if (mask != nullptr) {
    merge_columns<T, true, false>(before, after, mask, factor, result, 0, columns);
  } else {
    merge_columns<T, false, false>(before, after, mask, factor, result, 0, columns);
  }
}

// Streamed lines are ordered by no later store of the thread, not even by the one that says it is done.
void publish_streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

void fill_project_merge(Kernels& kernels) {
  kernels.merge_row[0] = merge_row<float>;
  kernels.merge_row[1] = merge_row<Float16>;
  kernels.merge_row[2] = merge_row<BFloat16>;
  kernels.publish_streamed = publish_streamed;
}

}  // namespace hpa::cpu::HPA_ISA
