// Argument checks that every operation makes first. The messages are literals that begin with the argument's name.
#pragma once

#include "hpa/types.h"

namespace hpa::cpu {

constexpr bool known(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

template <typename M>
constexpr bool empty(const M& matrix) {
  return matrix.rows == 0 || matrix.columns == 0;
}

constexpr Status kOutOfMemory = Status::unavailable("not enough memory for the operation's scratch buffers");

}  // namespace hpa::cpu

#define HPA_REQUIRE(condition, message)                       \
  do {                                                        \
    if (!(condition)) return ::hpa::Status::invalid(message); \
  } while (false)

#define HPA_REQUIRE_MATRIX(m)                                                                                   \
  do {                                                                                                          \
    HPA_REQUIRE(::hpa::cpu::known((m).dtype), #m ": dtype must be float32, float16 or bfloat16");               \
    HPA_REQUIRE((m).rows >= 0 && (m).columns >= 0, #m ": rows and columns must not be negative");               \
    HPA_REQUIRE((m).rows <= 1 || (m).row_stride >= (m).columns, #m ": row_stride must be at least columns");    \
    HPA_REQUIRE((m).data != nullptr || ::hpa::cpu::empty(m), #m ": data is null, but the matrix is not empty"); \
  } while (false)

#define HPA_REQUIRE_SAME_SHAPE(a, b)                                                                   \
  do {                                                                                                 \
    HPA_REQUIRE((a).dtype == (b).dtype, #b ": dtype must be that of " #a);                             \
    HPA_REQUIRE((a).rows == (b).rows && (a).columns == (b).columns, #b ": shape must be that of " #a); \
  } while (false)
