// Element types, conversions, and eight neighbouring elements at a time.
#pragma once

#include <cstdint>

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
__device__ __forceinline__ void from_float(float value, BFloat16& result) {
  result.bits = ptx::bfloat_of_float(value);
}

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
  // Elements are set in ascending order, each once.
  __device__ __forceinline__ void set_bits(int i, std::uint32_t value_bits) {
    if constexpr (sizeof(T) == 4) {
      words[i] = value_bits;
    } else {
      words[i / 2] = i % 2 == 0 ? value_bits : (words[i / 2] | (value_bits << 16));
    }
  }
};

template <class T>
__device__ __forceinline__ std::uint32_t rounded_bits(float value) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(value);
  } else {
    T result;
    from_float(value, result);
    return result.bits;
  }
}

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
#pragma unroll
    for (int i = 0; i < 8; ++i) result.set_bits(i, i < count ? bits_of(source[i]) : 0u);
  }
  return result;
}

template <bool kVectorized, class T>
__device__ __forceinline__ void store_eight(T* target, int count, const Eight<T>& value) {
  if (kVectorized && count >= 8) {
    uint4* vectors = reinterpret_cast<uint4*>(target);
#pragma unroll
    for (int v = 0; v < Eight<T>::kWords / 4; ++v) {
      vectors[v] = make_uint4(value.words[4 * v], value.words[4 * v + 1], value.words[4 * v + 2], value.words[4 * v + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) target[i] = of_bits<T>(value.bits(i));
    }
  }
}

// How many of the eight columns from `first` on exist.
__device__ __forceinline__ int eight_count(std::int64_t first, std::int64_t columns) {
  const std::int64_t left = columns - first;
  return left >= 8 ? 8 : (left > 0 ? static_cast<int>(left) : 0);
}

}  // namespace hpa::cuda
