// column_mask: exactly the k highest scores, as a mask.
#pragma once

#include "hpa/types.h"

namespace hpa {

struct ColumnMaskArguments {
  const float* scores;           // [batch, columns] contiguous
  const std::uint8_t* eligible;  // [batch, columns] contiguous, or null: only non-zero columns may be chosen
  const std::int64_t* counts;    // [batch] how many to choose; clamped to [0, eligible columns]
  std::uint8_t* mask;            // [batch, columns] contiguous, written 0 or 1
  std::int64_t batch;
  std::int64_t columns;  // at most 2^31 - 1
};

// One layer of a list. A count that the host knows needs no memory on the device.
struct ColumnMaskItem {
  ColumnMaskArguments arguments;  // counts may be null:
  std::int64_t count = 0;         // this is then the count of every row
};

// Ties go to the lower index; -0 equals +0; NaN ranks below every number.
namespace cpu {
Status column_mask_list(const ColumnMaskItem* items, std::int64_t count);
// A list of one.
Status column_mask(ColumnMaskArguments arguments);
}  // namespace cpu
namespace cuda {
// counts lies in device memory, so a count computed on the device needs no synchronisation. One launch for up to 256
// items, which themselves lie in host memory and travel as a kernel parameter.
Status column_mask_list(const ColumnMaskItem* items, std::int64_t count, Stream stream);
// A list of one.
Status column_mask(ColumnMaskArguments arguments, Stream stream);
}  // namespace cuda

}  // namespace hpa
