// Test data: reproducible random numbers, a conversion to and from each dtype written without the core's, and
// matrices that lie inside a larger buffer whose other bytes must not change.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "hpa/types.h"

namespace hpa::test {

inline constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};
inline const char* name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::float16 ? "float16" : "bfloat16";
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(engine_) < p; }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

// The nearest value of a format with `digits` significant bits and smallest exponent `lowest`, ties to even, from
// the definition: scale to an integer, round it, scale back.
inline double rounded(double value, int digits, int lowest, double largest) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), lowest);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double result = std::nearbyint(value / unit) * unit;
  return std::abs(result) > largest ? std::copysign(INFINITY, value) : result;
}

inline double round_to(double value, DType dtype) {
  switch (dtype) {
    case DType::float16:
      return rounded(static_cast<float>(value), 11, -14, 65504);
    case DType::bfloat16:
      return rounded(static_cast<float>(value), 8, -126, std::ldexp(255.0, 120));
    default:
      return static_cast<float>(value);
  }
}

inline std::uint32_t encode(double value, DType dtype) {
  const float single = static_cast<float>(round_to(value, dtype));
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(single);
  if (dtype == DType::float32) return bits;
  if (dtype == DType::bfloat16) return std::isnan(single) ? 0x7fc0u : bits >> 16;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  if (std::isnan(single)) return sign | 0x7e00u;
  if (std::isinf(single)) return sign | 0x7c00u;
  const double magnitude = std::abs(static_cast<double>(single));
  if (magnitude < std::ldexp(1.0, -14)) return sign | static_cast<std::uint32_t>(std::ldexp(magnitude, 24));
  const int exponent = std::ilogb(magnitude);
  return sign | (static_cast<std::uint32_t>(exponent + 15) << 10) |
         (static_cast<std::uint32_t>(std::ldexp(magnitude, 10 - exponent)) & 0x3ffu);
}

inline double decode(std::uint32_t bits, DType dtype) {
  if (dtype == DType::float32) return std::bit_cast<float>(bits);
  if (dtype == DType::bfloat16) return std::bit_cast<float>(bits << 16);
  const int exponent = static_cast<int>((bits >> 10) & 31), fraction = static_cast<int>(bits & 0x3ff);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25));
}

// [rows, columns] with row_stride >= columns, starting `offset` elements into a buffer filled with a sentinel.
class GuardedMatrix {
 public:
  GuardedMatrix(std::int64_t rows, std::int64_t columns, DType dtype, std::int64_t padding = 5, std::int64_t offset = 3)
      : rows_(rows),
        columns_(columns),
        stride_(columns + padding),
        offset_(offset),
        dtype_(dtype),
        bytes_((offset + rows * stride_ + 16) * static_cast<std::int64_t>(size_of(dtype)), kSentinel) {}

  ConstMatrix view() const { return {bytes_.data() + position(0, 0), dtype_, rows_, columns_, stride_}; }
  Matrix mutable_view() { return {bytes_.data() + position(0, 0), dtype_, rows_, columns_, stride_}; }

  std::uint32_t bits(std::int64_t row, std::int64_t column) const {
    std::uint32_t word = 0;
    for (std::size_t i = 0; i < size_of(dtype_); ++i)
      word |= std::uint32_t{bytes_[position(row, column) + i]} << (8 * i);
    return word;
  }
  void set_bits(std::int64_t row, std::int64_t column, std::uint32_t word) {
    for (std::size_t i = 0; i < size_of(dtype_); ++i)
      bytes_[position(row, column) + i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
  double at(std::int64_t row, std::int64_t column) const { return decode(bits(row, column), dtype_); }
  void set(std::int64_t row, std::int64_t column, double value) { set_bits(row, column, encode(value, dtype_)); }

  void fill_normal(Random& random, double scale = 1) {
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < columns_; ++j) set(i, j, scale * random.normal());
    }
  }

  // Everything around the matrix still holds the sentinel.
  bool guards_intact() const {
    const std::size_t element = size_of(dtype_);
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      const std::int64_t index = static_cast<std::int64_t>(i / element) - offset_;
      const bool inside = columns_ > 0 && index >= 0 && index / stride_ < rows_ && index % stride_ < columns_;
      if (!inside && bytes_[i] != kSentinel) return false;
    }
    return true;
  }
  bool operator==(const GuardedMatrix& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr std::uint8_t kSentinel = 0xa5;
  std::size_t position(std::int64_t row, std::int64_t column) const {
    return static_cast<std::size_t>(offset_ + row * stride_ + column) * size_of(dtype_);
  }
  std::int64_t rows_, columns_, stride_, offset_;
  DType dtype_;
  std::vector<std::uint8_t> bytes_;
};

}  // namespace hpa::test
