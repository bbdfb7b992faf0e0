#include "hpa/column_scores.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kStripRows = 128;

const char* at(const ConstMatrix& m, std::int64_t row, std::int64_t column) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + column) * static_cast<std::int64_t>(size_of(m.dtype));
}

}  // namespace

// The weights are cut into strips of kStripRows rows and kScoreColumns columns; each is summed in float32, and the
// strips are added in float64, in order.
Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result) {
  HPA_RETURN_UNLESS_OK(check_column_scores(w_old, w_new, result));

  const std::int64_t rows = w_old.rows, columns = w_old.columns;
  const std::int64_t strips = (rows + kStripRows - 1) / kStripRows;
  const std::int64_t blocks = (columns + kScoreColumns - 1) / kScoreColumns;
  Buffer<float> squared(strips * columns);
  Buffer<double> scalars(strips * blocks * 2);
  if (!squared || !scalars) return kOutOfMemory;

  const auto strip_scores = kernels().column_scores[static_cast<int>(w_old.dtype)];
  parallel_for(strips * blocks, [&](std::int64_t task) {
    const std::int64_t strip = task / blocks, block = task % blocks;
    const std::int64_t row = strip * kStripRows, column = block * kScoreColumns;
    strip_scores(at(w_old, row, column), w_old.row_stride, at(w_new, row, column), w_new.row_stride,
                 std::min(kStripRows, rows - row), std::min(kScoreColumns, columns - column),
                 squared.data() + strip * columns + column, scalars.data() + task * 2);
  });

  constexpr std::int64_t kColumnsAtOnce = 256;
  parallel_for((columns + kColumnsAtOnce - 1) / kColumnsAtOnce, [&](std::int64_t task) {
    const std::int64_t first = task * kColumnsAtOnce, count = std::min(kColumnsAtOnce, columns - first);
    double sums[kColumnsAtOnce] = {};
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      const float* part = squared.data() + strip * columns + first;
      for (std::int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(part[j]);
    }
    for (std::int64_t j = 0; j < count; ++j) result.squared_update[first + j] = static_cast<float>(sums[j]);
  });
  double inner = 0, norm = 0;
  for (std::int64_t task = 0; task < strips * blocks; ++task) {
    inner += scalars[task * 2];
    norm += scalars[task * 2 + 1];
  }
  *result.inner_product = static_cast<float>(inner);
  *result.old_squared_norm = static_cast<float>(norm);
  return {};
}

}  // namespace hpa::cpu
