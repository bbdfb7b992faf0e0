#include "hpa/project_merge.h"

#include <algorithm>
#include <cstring>

#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/task_list.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kTaskBytes = std::int64_t{1} << 18;

// A list that writes more than this writes past the caches, in place as well (+14 and +30 % on two threads of a Zen 5,
// 4096 x 4096 bfloat16): little of it would be there still when the caller comes to read it.
constexpr std::int64_t kStreamedBytes = std::int64_t{16} << 20;

std::int64_t rows_per_task(const Matrix& out) {
  return std::max<std::int64_t>(1, kTaskBytes / (out.columns * static_cast<std::int64_t>(size_of(out.dtype))));
}

void merge_rows(const ProjectMergeItem& item, std::int64_t first, std::int64_t last, bool streamed) {
  const auto& [w_old, w_new, mask, axis, coefficient, out] = item;
  const std::int64_t element = static_cast<std::int64_t>(size_of(out.dtype));
  const auto merge_row = kernels().merge_row[static_cast<int>(out.dtype)];
  for (std::int64_t row = first; row < last; ++row) {
    const char* before = static_cast<const char*>(w_old.data) + row * w_old.row_stride * element;
    const char* after = static_cast<const char*>(w_new.data) + row * w_new.row_stride * element;
    char* target = static_cast<char*>(out.data) + row * out.row_stride * element;
    if (axis == MaskAxis::input) {
      merge_row(before, after, mask, *coefficient, target, out.columns, streamed);
    } else if (mask[row] == 0) {
      merge_row(before, after, nullptr, *coefficient, target, out.columns, streamed);
    } else if (target != before) {
      std::memcpy(target, before, static_cast<std::size_t>(out.columns * element));
    }
  }
  if (streamed) kernels().publish_streamed();
}

}  // namespace

Status project_merge_list(const ProjectMergeItem* items, std::int64_t count) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_project_merge));
  TaskList tasks(count);
  if (!tasks) return kOutOfMemory;
  std::int64_t written = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Matrix& out = items[i].out;
    written += out.rows * out.columns * static_cast<std::int64_t>(size_of(out.dtype));
    const std::int64_t rows = is_empty(out) ? 1 : rows_per_task(out);
    tasks.add(is_empty(out) ? 0 : (out.rows + rows - 1) / rows);
  }
  parallel_for(tasks.tasks(), [&](std::int64_t number) {
    const auto [item, task] = tasks.find(number);
    const Matrix& out = items[item].out;
    const std::int64_t rows = rows_per_task(out);
    merge_rows(items[item], task * rows, std::min(out.rows, (task + 1) * rows), written > kStreamedBytes);
  });
  return {};
}

Status project_merge(ConstMatrix w_old, ConstMatrix w_new, const std::uint8_t* mask, MaskAxis axis,
                     const float* coefficient, Matrix out) {
  const ProjectMergeItem item = {w_old, w_new, mask, axis, coefficient, out};
  return project_merge_list(&item, 1);
}

}  // namespace hpa::cpu
