#include "hpa/column_scores.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/task_list.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kStripRows = 128;
constexpr std::int64_t kColumnsAtOnce = 256;  // of one task that adds strips up
constexpr std::int64_t kScratchBytes = std::int64_t{32} << 20;

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

const char* at(const ConstMatrix& m, std::int64_t row, std::int64_t column) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + column) * static_cast<std::int64_t>(size_of(m.dtype));
}

// How a layer is cut: strips of kStripRows rows by blocks of kScoreColumns columns, from its shape alone.
struct Cut {
  std::int64_t rows, columns, strips, blocks;

  explicit Cut(const ColumnScoresItem& item)
      : rows(item.w_old.rows),
        columns(item.w_old.columns),
        strips(ceil_div(rows, kStripRows)),
        blocks(ceil_div(columns, kScoreColumns)) {}
  std::int64_t squares() const { return strips * columns; }
  std::int64_t scalars() const { return strips * blocks * 2; }
  std::int64_t bytes() const { return squares() * 4 + scalars() * 8; }
};

// One layer's place in the scratch memory.
struct Parts {
  float* squares;   // [strips, columns]
  double* scalars;  // [strips, blocks, 2]
};

void sum_strip(const ColumnScoresItem& item, const Parts& parts, std::int64_t task, float* running) {
  const Cut cut(item);
  const std::int64_t strip = task / cut.blocks, block = task % cut.blocks;
  const std::int64_t row = strip * kStripRows, column = block * kScoreColumns;
  kernels().column_scores[static_cast<int>(item.w_old.dtype)](
      at(item.w_old, row, column), item.w_old.row_stride, at(item.w_new, row, column), item.w_new.row_stride,
      std::min(kStripRows, cut.rows - row), std::min(kScoreColumns, cut.columns - column), running,
      parts.squares + strip * cut.columns + column, parts.scalars + task * 2);
}

// The strips are added in float64, in order. Task 0 adds the two scalars as well, also where there is no column.
void add_strips(const ColumnScoresItem& item, const Parts& parts, std::int64_t task) {
  const Cut cut(item);
  const std::int64_t first = task * kColumnsAtOnce, count = std::min(kColumnsAtOnce, cut.columns - first);
  double sums[kColumnsAtOnce] = {};
  for (std::int64_t strip = 0; strip < cut.strips; ++strip) {
    const float* part = parts.squares + strip * cut.columns + first;
    for (std::int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(part[j]);
  }
  for (std::int64_t j = 0; j < count; ++j) item.result.squared_update[first + j] = static_cast<float>(sums[j]);
  if (task != 0) return;
  double inner = 0, norm = 0;
  for (std::int64_t part = 0; part < cut.strips * cut.blocks; ++part) {
    inner += parts.scalars[part * 2];
    norm += parts.scalars[part * 2 + 1];
  }
  *item.result.inner_product = static_cast<float>(inner);
  *item.result.old_squared_norm = static_cast<float>(norm);
}

// Layers whose partial sums fit into the scratch memory together.
Status score_batch(const ColumnScoresItem* items, std::int64_t count, Parts* parts) {
  TaskList sums(count), additions(count);
  std::int64_t squares = 0, scalars = 0;
  for (std::int64_t i = 0; i < count; ++i) squares += Cut(items[i]).squares(), scalars += Cut(items[i]).scalars();
  Buffer<float> all_squares(squares);
  Buffer<double> all_scalars(scalars);
  const std::int64_t slots = slot_count();
  Buffer<float> running(slots * kScoreColumns);
  if (!sums || !additions || !all_squares || !all_scalars || !running) return kOutOfMemory;
  squares = scalars = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Cut cut(items[i]);
    parts[i] = {all_squares.data() + squares, all_scalars.data() + scalars};
    squares += cut.squares(), scalars += cut.scalars();
    sums.add(cut.strips * cut.blocks);
    additions.add(std::max<std::int64_t>(1, ceil_div(cut.columns, kColumnsAtOnce)));
  }
  parallel_for(sums.tasks(), slots, [&](std::int64_t number, std::int64_t slot) {
    const auto [item, task] = sums.find(number);
    sum_strip(items[item], parts[item], task, running.data() + slot * kScoreColumns);
  });
  parallel_for(additions.tasks(), [&](std::int64_t number) {
    const auto [item, task] = additions.find(number);
    add_strips(items[item], parts[item], task);
  });
  return {};
}

}  // namespace

Status column_scores_list(const ColumnScoresItem* items, std::int64_t count) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_column_scores));
  Buffer<Parts> parts(count);
  if (!parts) return kOutOfMemory;
  for (std::int64_t first = 0, last = 0; first < count; first = last) {
    std::int64_t bytes = Cut(items[last++]).bytes();
    while (last < count && bytes + Cut(items[last]).bytes() <= kScratchBytes) bytes += Cut(items[last++]).bytes();
    HPA_RETURN_UNLESS_OK(score_batch(items + first, last - first, parts.data()));
  }
  return {};
}

Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result) {
  const ColumnScoresItem item = {w_old, w_new, result};
  return column_scores_list(&item, 1);
}

}  // namespace hpa::cpu
