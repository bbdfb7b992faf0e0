#include "hpa/column_mask.h"

#include <algorithm>
#include <bit>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/parallel.h"

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

Status column_mask(ColumnMaskArguments arguments) {
  const auto [scores, eligible, counts, mask, batch, columns] = arguments;
  HPA_RETURN_UNLESS_OK(check_column_mask(arguments));
  if (batch == 0 || columns == 0) return {};

  const std::int64_t slots = std::min(slot_count(), batch);
  Buffer<std::uint64_t> keys(slots * columns);
  if (!keys) return kOutOfMemory;
  parallel_for(batch, slots, [&](std::int64_t row, std::int64_t slot) {
    choose(arguments.scores + row * arguments.columns,
           arguments.eligible == nullptr ? nullptr : arguments.eligible + row * arguments.columns,
           arguments.counts[row], arguments.columns, keys.data() + slot * arguments.columns,
           arguments.mask + row * arguments.columns);
  });
  return {};
}

}  // namespace hpa::cpu
