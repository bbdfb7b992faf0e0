// Argument checks and dispatch shared by the host side of all operations.
#pragma once

#include <cstdint>

#include "argument_checks.h"
#include "cuda/numeric.cuh"

namespace hpa::cuda {

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
