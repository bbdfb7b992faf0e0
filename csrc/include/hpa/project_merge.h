// project_merge: the harmonized weight, M * w_old + (1 - M) * (w_new - c * w_old), in one pass (HPA section 3.3).
#pragma once

#include "hpa/types.h"

namespace hpa {

enum class MaskAxis : std::int32_t {
  input = 0,   // mask [in]: whole columns of w_old are retained
  output = 1,  // mask [out]: whole rows
};

// One layer of a list. w_old, w_new, out [out, in] of one dtype; mask bytes, non-zero = retained; coefficient points to
// one float. Layers of a list may differ in everything.
struct ProjectMergeItem {
  ConstMatrix w_old;
  ConstMatrix w_new;
  const std::uint8_t* mask;
  MaskAxis axis;
  const float* coefficient;
  Matrix out;
};

namespace cpu {

// Retained elements are copied bit by bit; the others are computed in float32 and rounded to nearest even.
// out may be w_old or w_new itself (same pointer and row stride), but must not overlap them otherwise, nor anything
// that another item of the list reads or writes.
Status project_merge_list(const ProjectMergeItem* items, std::int64_t count);

// A list of one.
Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out);

}  // namespace cpu
namespace cuda {

// As on the CPU. coefficient and mask lie in device memory. One launch for up to 256 layers, whatever their shapes,
// dtypes and strides; the items themselves lie in host memory and travel as a kernel parameter.
Status project_merge_list(const ProjectMergeItem* items, std::int64_t count, Stream stream);

// A list of one.
Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out, Stream stream);

}  // namespace cuda
}  // namespace hpa
