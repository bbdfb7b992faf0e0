#include "hpa/column_mask.h"

#include <algorithm>
#include <bit>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/parallel.h"
#include "cpu/task_list.h"

namespace hpa::cpu {
namespace {

// Unsigned integers in the order of the scores: NaN lowest, both zeros alike.
std::uint32_t ordered(float score) {
  if (score != score) return 0;
  if (score == 0.0f) score = 0.0f;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(score);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Marks the `count` best columns of one row. Score and index make one key, so no two keys are equal and the choice
// among ties is settled: a higher score is a smaller key, and then a lower index is.
void choose(const float* scores, const std::uint8_t* eligible, std::int64_t count, std::int64_t columns,
            std::uint64_t* keys, std::uint8_t* mask) {
  std::int64_t candidates = 0;
  for (std::int64_t j = 0; j < columns; ++j) {
    if (eligible != nullptr && eligible[j] == 0) continue;
    keys[candidates++] = (std::uint64_t{~ordered(scores[j])} << 32) | static_cast<std::uint64_t>(j);
  }
  count = std::clamp<std::int64_t>(count, 0, candidates);
  if (count < candidates) std::nth_element(keys, keys + count, keys + candidates);
  std::fill(mask, mask + columns, std::uint8_t{0});
  for (std::int64_t i = 0; i < count; ++i) mask[keys[i] & 0xffffffffu] = 1;
}

}  // namespace

Status column_mask_list(const ColumnMaskItem* items, std::int64_t count) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_column_mask));
  TaskList tasks(count);
  if (!tasks) return kOutOfMemory;
  std::int64_t most_columns = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const ColumnMaskArguments& arguments = items[i].arguments;
    tasks.add(arguments.columns > 0 ? arguments.batch : 0);
    most_columns = std::max(most_columns, arguments.columns);
  }
  if (tasks.tasks() == 0) return {};

  const std::int64_t slots = std::min(slot_count(), tasks.tasks());
  Buffer<std::uint64_t> keys(slots * most_columns);
  if (!keys) return kOutOfMemory;
  parallel_for(tasks.tasks(), slots, [&](std::int64_t task, std::int64_t slot) {
    const auto [item, row] = tasks.find(task);
    const auto& [scores, eligible, counts, mask, batch, columns] = items[item].arguments;
    const std::int64_t wanted = counts == nullptr ? items[item].count : counts[row];
    choose(scores + row * columns, eligible == nullptr ? nullptr : eligible + row * columns, wanted, columns,
           keys.data() + slot * most_columns, mask + row * columns);
  });
  return {};
}

Status column_mask(ColumnMaskArguments arguments) {
  HPA_RETURN_UNLESS_OK(check_column_mask(arguments));
  const ColumnMaskItem item = {arguments};
  return column_mask_list(&item, 1);
}

}  // namespace hpa::cpu
