#include "hpa/project_merge.h"

#include <algorithm>
#include <cstring>

#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kTaskBytes = std::int64_t{1} << 18;

}  // namespace

Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out) {
  HPA_RETURN_UNLESS_OK(check_project_merge(w_old, w_new, mask, axis, coefficient, out));
  if (is_empty(out)) return {};

  const std::int64_t element = static_cast<std::int64_t>(size_of(out.dtype));
  const std::int64_t row_bytes = out.columns * element;
  const std::int64_t task_rows = std::max<std::int64_t>(1, kTaskBytes / row_bytes);
  const float factor = *coefficient;
  const auto merge_row = kernels().merge_row[static_cast<int>(out.dtype)];
  parallel_for((out.rows + task_rows - 1) / task_rows, [&](std::int64_t task) {
    const std::int64_t last = std::min(out.rows, (task + 1) * task_rows);
    for (std::int64_t row = task * task_rows; row < last; ++row) {
      const char* before = static_cast<const char*>(w_old.data) + row * w_old.row_stride * element;
      const char* after = static_cast<const char*>(w_new.data) + row * w_new.row_stride * element;
      char* target = static_cast<char*>(out.data) + row * out.row_stride * element;
      if (axis == MaskAxis::input) {
        merge_row(before, after, mask, factor, target, out.columns);
      } else if (mask[row] == 0) {
        merge_row(before, after, nullptr, factor, target, out.columns);
      } else if (target != before) {
        std::memcpy(target, before, static_cast<std::size_t>(row_bytes));
      }
    }
  });
  return {};
}

}  // namespace hpa::cpu
