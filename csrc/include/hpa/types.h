// The vocabulary of the C++ API: dtypes, matrix views and the status every operation returns.
//
// The core knows neither Python nor torch. The caller owns all memory; a view is a pointer with sizes and
// strides counted in elements. Every function is in hpa::cpu or hpa::cuda, with the same meaning in both.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hpa {

enum class DType : std::int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A row-major matrix whose columns are adjacent; rows may lie any distance apart.
struct ConstMatrix {
  const void* data;  // [rows, columns], null only if it holds no element
  DType dtype;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;  // elements between the starts of neighbouring rows
};

struct Matrix {
  void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;
};

enum class StatusCode : std::int32_t {
  ok = 0,
  invalid_argument = 1,  // the caller passed something the operation does not take
  unavailable = 2,       // this build or this machine cannot run the operation
  device_error = 3,      // a CUDA call or launch failed; `device_code` is its cudaError_t
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::ok;
  const char* message = "";  // static storage: never freed
  std::int32_t device_code = 0;

  constexpr bool ok() const { return code == StatusCode::ok; }
  static constexpr Status invalid(const char* text) { return {StatusCode::invalid_argument, text, 0}; }
  static constexpr Status unavailable(const char* text) { return {StatusCode::unavailable, text, 0}; }
};

// A cudaStream_t, so that this header needs no CUDA; null is the default stream.
// Its device, where all memory of the call lies, must be the current one of the calling thread.
using Stream = void*;

}  // namespace hpa
