// Argument checks and dispatch shared by the host side of all operations.
#pragma once

#include <cstdint>

#include "cuda/numeric.cuh"
#include "hpa/types.h"

namespace hpa::cuda {

inline bool known_dtype(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

template <class View>
bool is_empty(const View& view) {
  return view.rows == 0 || view.columns == 0;
}

// The messages are literals that begin with the argument's name, as on the CPU.
#define HPA_REQUIRE(condition, message)                       \
  do {                                                        \
    if (!(condition)) return ::hpa::Status::invalid(message); \
  } while (false)

#define HPA_REQUIRE_MATRIX(m)                                                                                \
  do {                                                                                                       \
    HPA_REQUIRE(known_dtype((m).dtype), #m ": dtype must be float32, float16 or bfloat16");                  \
    HPA_REQUIRE((m).rows >= 0 && (m).columns >= 0, #m ": rows and columns must not be negative");            \
    HPA_REQUIRE((m).rows <= 1 || (m).row_stride >= (m).columns, #m ": row_stride must be at least columns"); \
    HPA_REQUIRE((m).data != nullptr || is_empty(m), #m ": data is null, but the matrix is not empty");       \
  } while (false)

#define HPA_REQUIRE_SAME_SHAPE(a, b)                                                                   \
  do {                                                                                                 \
    HPA_REQUIRE((a).dtype == (b).dtype, #b ": dtype must be that of " #a);                             \
    HPA_REQUIRE((a).rows == (b).rows && (a).columns == (b).columns, #b ": shape must be that of " #a); \
  } while (false)

#define HPA_REQUIRE_WORKSPACE(workspace)                         \
  HPA_REQUIRE((workspace) != nullptr && aligned16(workspace),    \
              "workspace: must not be null and must be 16-byte " \
              "aligned")

inline bool aligned16(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Whether every row starts on a 16-byte boundary, so that a kernel may load 16 bytes at a time.
template <class View>
bool rows_aligned16(const View& view) {
  return aligned16(view.data) &&
         (view.rows <= 1 || view.row_stride * static_cast<std::int64_t>(size_of(view.dtype)) % 16 == 0);
}

template <class Type>
struct TypeTag {
  using type = Type;
};

// Calls function(TypeTag<element type>).
template <class Function>
Status with_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float32:
      return function(TypeTag<float>{});
    case DType::float16:
      return function(TypeTag<Float16>{});
    case DType::bfloat16:
      return function(TypeTag<BFloat16>{});
  }
  return Status::invalid("dtype: must be float32, float16 or bfloat16");
}

template <bool kValue>
struct BoolTag {
  static constexpr bool value = kValue;
};

// Calls function(BoolTag<flag>).
template <class Function>
Status with_bool(bool flag, Function&& function) {
  return flag ? function(BoolTag<true>{}) : function(BoolTag<false>{});
}

}  // namespace hpa::cuda
