// Element types, conversions, and eight neighbouring elements at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace hpa::cuda {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Float16 value) { return ptx::float_of_half(value.bits); }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}

// Round to nearest even.
__device__ __forceinline__ void from_float(float value, float& result) { result = value; }
__device__ __forceinline__ void from_float(float value, Float16& result) { result.bits = ptx::half_of_float(value); }
__device__ __forceinline__ void from_float(float value, BFloat16& result) { result.bits = ptx::bfloat_of_float(value); }

// By bits, so that no compiler option can fold it away.
__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// Eight neighbouring elements as raw bits in registers; index only with compile-time constants.
template <class T>
struct Eight {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  std::uint32_t words[kWords];

  __device__ __forceinline__ std::uint32_t bits(int i) const {
    if constexpr (sizeof(T) == 4) return words[i];
    return (words[i / 2] >> (16 * (i % 2))) & 0xffffu;
  }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      return to_float(T{static_cast<std::uint16_t>(bits(i))});
    }
  }
  // For each element the one of `kept` where its bit in `keep` is set, else values[i] rounded to nearest even.
  static __device__ __forceinline__ Eight choose(unsigned keep, const Eight& kept, const float (&values)[8]) {
    Eight result;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        result.words[w] = (keep >> w) & 1u ? kept.words[w] : __float_as_uint(values[w]);
      } else {
        const std::uint32_t mask =
            ((keep >> (2 * w)) & 1u ? 0xffffu : 0u) | ((keep >> (2 * w)) & 2u ? 0xffff0000u : 0u);
        result.words[w] = (kept.words[w] & mask) | (rounded_pair(values[2 * w], values[2 * w + 1]) & ~mask);
      }
    }
    return result;
  }

 private:
  static __device__ __forceinline__ std::uint32_t rounded_pair(float low, float high) {
    if constexpr (std::is_same_v<T, Float16>) return ptx::halves_of_floats(low, high);
    return ptx::bfloats_of_floats(low, high);
  }
};

template <class T>
__device__ __forceinline__ std::uint32_t bits_of(T value) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(value);
  } else {
    return value.bits;
  }
}

template <class T>
__device__ __forceinline__ T of_bits(std::uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    return T{static_cast<std::uint16_t>(bits)};
  }
}

template <class T>
__device__ __forceinline__ Eight<T> zero_eight() {
  Eight<T> result;
#pragma unroll
  for (int w = 0; w < Eight<T>::kWords; ++w) result.words[w] = 0;
  return result;
}

// The `count` elements from `source` on, zeros behind them. 16-byte loads with the streaming hint where kVectorized
// (then source lies on a 16-byte boundary) and count is 8.
template <bool kVectorized, class T>
__device__ __forceinline__ Eight<T> load_eight(const T* source, int count) {
  Eight<T> result;
  if (kVectorized && count >= 8) {
    const uint4* vectors = reinterpret_cast<const uint4*>(source);
#pragma unroll
    for (int v = 0; v < Eight<T>::kWords / 4; ++v) {
      const uint4 vector = __ldcs(vectors + v);
      result.words[4 * v] = vector.x;
      result.words[4 * v + 1] = vector.y;
      result.words[4 * v + 2] = vector.z;
      result.words[4 * v + 3] = vector.w;
    }
  } else {
    result = zero_eight<T>();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = i < count ? bits_of(source[i]) : 0u;
      if constexpr (sizeof(T) == 4) {
        result.words[i] = bits;
      } else {
        result.words[i / 2] |= bits << (16 * (i % 2));
      }
    }
  }
  return result;
}

template <bool kVectorized, class T>
__device__ __forceinline__ void store_eight(T* target, int count, const Eight<T>& value) {
  if (kVectorized && count >= 8) {
    uint4* vectors = reinterpret_cast<uint4*>(target);
#pragma unroll
    for (int v = 0; v < Eight<T>::kWords / 4; ++v) {
      // Through the intrinsic: a plain store may be split where its branch meets the one below.
      __stcg(vectors + v,
             make_uint4(value.words[4 * v], value.words[4 * v + 1], value.words[4 * v + 2], value.words[4 * v + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) target[i] = of_bits<T>(value.bits(i));
    }
  }
}

// How many rows of eight elements a memory-bound kernel reads before it uses the first: 64 bytes a thread and operand.
template <class T, bool kVectorized>
constexpr int kRowsInFlight = !kVectorized ? 1 : (sizeof(T) == 2 ? 4 : 2);

// How many of the eight columns from `first` on exist.
__device__ __forceinline__ int eight_count(std::int64_t first, std::int64_t columns) {
  const std::int64_t left = columns - first;
  return left >= 8 ? 8 : (left > 0 ? static_cast<int>(left) : 0);
}

}  // namespace hpa::cuda
