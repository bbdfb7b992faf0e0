// What the emulation tests share: random data in every dtype, guarded buffers, runs under several thread orders.
// The rounding used as reference is a search among all representable values, unrelated to the kernels' conversions.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "cuda_emulation.h"
#include "hpa/hpa.h"

namespace test {

using hpa::DType;
using hpa::Status;
using hpa::StatusCode;

inline int failures = 0;

#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition)) {                                             \
      if (++test::failures <= 20) {                                 \
        std::printf("%s:%d: %s  ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                   \
        std::printf("\n");                                          \
      }                                                             \
    }                                                               \
  } while (false)

inline int report(const char* name) {
  std::printf("%s: %s (%d failures; emulated on the CPU, no GPU involved)\n", name, failures == 0 ? "ok" : "FAILED",
              failures);
  return failures == 0 ? 0 : 1;
}

inline std::mt19937_64& generator() {
  static std::mt19937_64 instance(20240607);
  return instance;
}
inline double normal() { return std::normal_distribution<double>()(generator()); }
inline std::int64_t below(std::int64_t bound) {
  return std::uniform_int_distribution<std::int64_t>(0, bound - 1)(generator());
}

constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};
inline const char* name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::float16 ? "float16" : "bfloat16";
}

// The value of 16 bits with `fraction_bits` bits of fraction, from the format's definition.
inline double decode16(std::uint32_t bits, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1));
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    magnitude = std::ldexp(1.0 + std::ldexp(fraction, -fraction_bits), exponent - bias);
  }
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

// The nearest representable value's bits, ties to even, by bisection: positive floats are ordered as their bits.
inline std::uint32_t encode16(double value, int fraction_bits) {
  if (std::isnan(value)) return 0x7fff;
  const std::uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(value);
  const std::uint32_t infinity = ((1u << (15 - fraction_bits)) - 1u) << fraction_bits;
  std::uint32_t low = 0, high = infinity;  // decode(low) <= magnitude
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (decode16(middle, fraction_bits) <= magnitude ? low : high) = middle;
  }
  if (std::isinf(magnitude)) return sign | infinity;
  const double lower = decode16(low, fraction_bits);
  const double upper = high == infinity ? 2 * lower - decode16(low - 1, fraction_bits) : decode16(high, fraction_bits);
  const double to_lower = magnitude - lower, to_upper = upper - magnitude;
  const bool up = to_upper < to_lower || (to_upper == to_lower && low % 2 == 1);
  return sign | (up ? high : low);
}

inline double decode(DType dtype, std::uint32_t bits) {
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  return decode16(bits, dtype == DType::float16 ? 10 : 7);
}
inline std::uint32_t encode(DType dtype, double value) {
  if (dtype == DType::float32) {
    const float narrow = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    return bits;
  }
  return encode16(value, dtype == DType::float16 ? 10 : 7);
}

// Bytes between guards, at a chosen distance from a 16-byte boundary. Under AddressSanitizer even reading a guard ends
// the program.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes, std::size_t misalignment = 0)
      : bytes_(bytes),
        misalignment_(misalignment),
        offset_(kGuard + misalignment),
        memory_(bytes + 2 * kGuard + misalignment + 16, kSentinel) {
    const std::size_t past = reinterpret_cast<std::uintptr_t>(memory_.data()) % 16;
    if (past != 0) offset_ += 16 - past;
    protect();
  }
  Guarded(const Guarded& other) : Guarded(other.bytes_, other.misalignment_) {
    std::memcpy(as(), other.memory_.data() + other.offset_, bytes_);
  }
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { unprotect(); }
  template <class T = void>
  T* as() {
    return reinterpret_cast<T*>(memory_.data() + offset_);
  }
  bool intact() const {
    unprotect();
    bool fine = true;
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if ((i < offset_ || i >= offset_ + bytes_) && memory_[i] != kSentinel) fine = false;
    }
    protect();
    return fine;
  }
  static constexpr std::uint8_t kSentinel = 0xa5;

 private:
  void protect() const {
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory_.data(), offset_);
    __asan_poison_memory_region(memory_.data() + offset_ + bytes_, memory_.size() - offset_ - bytes_);
    __asan_unpoison_memory_region(memory_.data() + offset_, bytes_);
#endif
  }
  void unprotect() const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
#endif
  }

  static constexpr std::size_t kGuard = 256;
  std::size_t bytes_, misalignment_, offset_;
  std::vector<std::uint8_t> memory_;
};

// A matrix with a row stride, in guarded memory; the gaps between rows hold the sentinel.
class GuardedMatrix {
 public:
  GuardedMatrix(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                std::int64_t misaligned_by = 0)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        stride_(stride),
        memory_(static_cast<std::size_t>(rows > 0 ? (rows - 1) * stride + columns : 0) * hpa::size_of(dtype),
                static_cast<std::size_t>(misaligned_by) * hpa::size_of(dtype)) {}
  void* data() { return memory_.as(); }
  hpa::ConstMatrix view() { return {data(), dtype_, rows_, columns_, stride_}; }
  hpa::Matrix target() { return {data(), dtype_, rows_, columns_, stride_}; }
  std::uint32_t bits(std::int64_t row, std::int64_t column) {
    const std::int64_t at = row * stride_ + column;
    return dtype_ == DType::float32 ? memory_.as<std::uint32_t>()[at] : memory_.as<std::uint16_t>()[at];
  }
  double value(std::int64_t row, std::int64_t column) { return decode(dtype_, bits(row, column)); }
  void set_bits(std::int64_t row, std::int64_t column, std::uint32_t bits) {
    const std::int64_t at = row * stride_ + column;
    if (dtype_ == DType::float32) {
      memory_.as<std::uint32_t>()[at] = bits;
    } else {
      memory_.as<std::uint16_t>()[at] = static_cast<std::uint16_t>(bits);
    }
  }
  void set(std::int64_t row, std::int64_t column, double value) { set_bits(row, column, encode(dtype_, value)); }
  void fill_normal(double scale = 1.0) {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c) set(r, c, scale * normal());
    }
  }
  bool intact() {
    for (std::int64_t r = 0; r + 1 < rows_; ++r) {
      for (std::int64_t c = columns_; c < stride_; ++c) {
        if ((bits(r, c) & 0xffffu) != 0xa5a5u) return false;
      }
    }
    return memory_.intact();
  }
  DType dtype() const { return dtype_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }

 private:
  DType dtype_;
  std::int64_t rows_, columns_, stride_;
  Guarded memory_;
};

// Rows further apart than 2^31 elements, in reserved address space of which only what is touched takes memory. No data
// where the system does not give that much.
class FarRows {
 public:
  FarRows(DType dtype, std::int64_t rows, std::int64_t columns)
      : view_{nullptr, dtype, rows, columns, (std::int64_t{1} << 31) + 40},
        bytes_(static_cast<std::size_t>((rows - 1) * view_.row_stride + columns) * hpa::size_of(dtype)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    view_.data = memory == MAP_FAILED ? nullptr : memory;
    if (view_.data == nullptr) std::printf("skipped far rows: no %zu bytes of address space\n", bytes_);
  }
  FarRows(const FarRows&) = delete;
  FarRows& operator=(const FarRows&) = delete;
  ~FarRows() {
    if (view_.data != nullptr) munmap(view_.data, bytes_);
  }
  bool exists() const { return view_.data != nullptr; }
  hpa::ConstMatrix view() const { return {view_.data, view_.dtype, view_.rows, view_.columns, view_.row_stride}; }
  hpa::Matrix target() const { return view_; }
  // 16-bit dtypes only.
  std::uint16_t& bits(std::int64_t row, std::int64_t column) {
    return static_cast<std::uint16_t*>(view_.data)[row * view_.row_stride + column];
  }
  double value(std::int64_t row, std::int64_t column) { return decode(view_.dtype, bits(row, column)); }
  void fill_normal() {
    for (std::int64_t r = 0; r < view_.rows; ++r) {
      for (std::int64_t c = 0; c < view_.columns; ++c) {
        bits(r, c) = static_cast<std::uint16_t>(encode(view_.dtype, normal()));
      }
    }
  }

 private:
  hpa::Matrix view_;
  std::size_t bytes_;
};

// Runs `operation` under several orders of threads and blocks and both extremes of asynchronous copies. It appends
// what it computed to the bytes it is given, which must come out the same each time.
using Bytes = std::vector<std::uint8_t>;
inline void append(Bytes& bytes, const void* data, std::size_t size) {
  const auto* begin = static_cast<const std::uint8_t*>(data);
  bytes.insert(bytes.end(), begin, begin + size);
}
inline void in_every_order(const char* what, const std::function<void(Bytes&)>& operation, int orders = 4) {
  using hpa_emulation::Order;
  const Order kOrders[] = {Order::forward, Order::reverse, Order::random, Order::random};
  Bytes first;
  for (int i = 0; i < orders; ++i) {
    hpa_emulation::settings() = {kOrders[i], 17u + static_cast<unsigned>(i), i == 1 || i == 2, -1, 0};
    Bytes bytes;
    operation(bytes);
    if (i == 0) first = bytes;
    CHECK(bytes == first, "%s: results depend on the order of threads (order %d)", what, i);
  }
  hpa_emulation::settings() = {};
}

// Every launch's failure must come back as a device error.
inline void expect_launch_failures(const char* what, const std::function<Status()>& operation) {
  hpa_emulation::settings() = {};
  CHECK(operation().ok(), "%s", what);
  const int launches = hpa_emulation::settings().launches;
  CHECK(launches > 0, "%s: no launch", what);
  for (int i = 0; i < launches; ++i) {
    hpa_emulation::settings() = {};
    hpa_emulation::settings().failing_launch = i;
    const Status status = operation();
    CHECK(status.code == StatusCode::device_error && status.device_code == 9, "%s: launch %d of %d failed unseen", what,
          i, launches);
  }
  hpa_emulation::settings() = {};
}

inline void expect_invalid(const char* what, Status status) {
  CHECK(status.code == StatusCode::invalid_argument && status.message[0] != '\0', "%s was accepted", what);
}

}  // namespace test
