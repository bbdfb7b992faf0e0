#include "hpa/low_rank.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

// Rows of a task. A strip's squares are summed in float32, and the strips in float64.
constexpr std::int64_t kStripRows = 2 * kPanel;
// Columns of a task: so many that their panels of A stay in the second-level cache while the rows pass by.
constexpr std::int64_t kBlockBytes = std::int64_t{512} << 10;
constexpr std::int64_t kPackPanels = 16;  // of one packing task

std::int64_t groups(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

const char* at(const ConstMatrix& m, std::int64_t row, std::int64_t column) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + column) * static_cast<std::int64_t>(size_of(m.dtype));
}

// A as panels, packed once for all rows; panels of B, packed by whoever needs them; and how the weight is cut into
// tasks. Float32 and pairs of bfloat16 both take 32 bits.
class Operands {
 public:
  Operands(const ConstMatrix& w_old, const LowRankUpdate& update)
      : w_old_(w_old),
        update_(update),
        pairs_(kernels().low_rank_pair_scores[0] != nullptr && update.a.dtype == DType::bfloat16 &&
               update.b.dtype == DType::bfloat16),
        rank_(update.a.rows),
        depth_(pairs_ ? (rank_ + 1) / 2 : rank_),
        panels_(groups(w_old.columns, kPanel)),
        block_panels_(panels_of_block()),
        slots_(slot_count()),
        right_(panels_ * panel()),
        left_(slots_ * (panel() + kPanel * depth_)),
        order_(rank_) {}

  bool allocated() const { return right_ && left_ && order_; }
  bool pairs() const { return pairs_; }
  std::int64_t blocks() const { return groups(panels_, block_panels_); }
  std::int64_t strips() const { return groups(w_old_.rows, kStripRows); }

  void pack_right() {
    for (std::int64_t k = 0; k < rank_; ++k) order_[k] = pairs_ ? place_in_pair(k) : k;
    const Kernels& loops = kernels();
    const ConstMatrix& a = update_.a;
    parallel_for(groups(panels_, kPackPanels), [&](std::int64_t task) {
      const std::int64_t column = task * kPackPanels * kPanel;
      const std::int64_t columns = std::min(kPackPanels * kPanel, a.columns - column);
      std::uint32_t* out = right_.data() + task * kPackPanels * panel();
      if (pairs_) {
        loops.pack_token_pairs(a.data, a.row_stride, order_.data(), rank_, column, columns, out, panel());
      } else {
        loops.pack_tokens[static_cast<int>(a.dtype)](a.data, a.row_stride, order_.data(), rank_, column, columns,
                                                     reinterpret_cast<float*>(out), panel());
      }
    });
  }

  // Calls body(task, block, row, column) for the blocks of every task. Tasks that follow each other share their panels
  // of A, and a task's blocks come in a fixed order.
  template <typename Body>
  void for_each_block(Body&& body) {
    parallel_for(strips() * blocks(), slots_, [&](std::int64_t task, std::int64_t slot) {
      const std::int64_t first_row = task % strips() * kStripRows, first_panel = task / strips() * block_panels_;
      const std::int64_t last_panel = std::min(panels_, first_panel + block_panels_), column = first_panel * kPanel;
      std::uint32_t* left = left_.data() + slot * (panel() + kPanel * depth_);
      for (std::int64_t row = first_row; row < std::min(w_old_.rows, first_row + kStripRows); row += kPanel) {
        const std::int64_t rows = std::min(kPanel, w_old_.rows - row);
        pack_left(row, rows, left, left + panel());
        const LowRankBlock block = {left,
                                    right_.data() + first_panel * panel(),
                                    depth_,
                                    rows,
                                    std::min(w_old_.columns, last_panel * kPanel) - column,
                                    update_.scaling,
                                    at(w_old_, row, column),
                                    w_old_.row_stride};
        body(task, block, row, column);
      }
    });
  }

 private:
  std::int64_t panel() const { return depth_ * kPanel; }
  std::int64_t panel_bytes() const { return std::max<std::int64_t>(1, panel()) * 4; }
  // Blocks of about one size. A weight without columns has no block, of one panel.
  std::int64_t panels_of_block() const {
    const std::int64_t most = std::max<std::int64_t>(1, kBlockBytes / panel_bytes());
    return std::max<std::int64_t>(1, groups(panels_, std::max<std::int64_t>(1, groups(panels_, most))));
  }

  // vdpbf16ps adds the product of the upper halves first: with the earlier element there, a sum is in the order of the
  // rank, and has the bits that float32 arithmetic gives. The last element of an odd rank is paired with zero.
  std::int64_t place_in_pair(std::int64_t k) const { return k + 1 == rank_ && k % 2 == 0 ? k : k ^ 1; }

  // Rows of B side by side. Pairs are moved as the 32 bits that they are.
  void pack_left(std::int64_t row, std::int64_t rows, std::uint32_t* out, std::uint32_t* scratch) const {
    const Kernels& loops = kernels();
    const ConstMatrix& b = update_.b;
    if (!pairs_ && (b.row_stride == rank_ || rows == 1)) {
      loops.pack_transposed[static_cast<int>(b.dtype)](at(b, row, 0), rows, depth_, reinterpret_cast<float*>(out));
      return;
    }
    const std::size_t element = size_of(b.dtype);
    const std::int64_t width = pairs_ ? 2 * depth_ : depth_;
    char* rows_of_b = reinterpret_cast<char*>(scratch);
    if (width != rank_) std::memset(rows_of_b, 0, static_cast<std::size_t>(rows * width) * element);
    for (std::int64_t i = 0; i < rows && rank_ > 0; ++i) {
      std::memcpy(rows_of_b + static_cast<std::size_t>(i * width) * element, at(b, row + i, 0),
                  static_cast<std::size_t>(rank_) * element);
      for (std::int64_t k = 0; pairs_ && k < rank_ / 2; ++k) {
        scratch[i * depth_ + k] = std::rotl(scratch[i * depth_ + k], 16);
      }
    }
    const DType moved = pairs_ ? DType::float32 : b.dtype;
    loops.pack_transposed[static_cast<int>(moved)](scratch, rows, depth_, reinterpret_cast<float*>(out));
  }

  const ConstMatrix w_old_;
  const LowRankUpdate update_;
  const bool pairs_;
  const std::int64_t rank_, depth_, panels_, block_panels_;
  const std::int64_t slots_;  // read once: scratch is indexed by slots, and another thread may set another count
  Buffer<std::uint32_t> right_, left_;  // [panels][depth][kPanel]; for each slot a panel, and as many elements unpacked
  Buffer<std::int64_t> order_;
};

// Gain and mask along one axis of the weight, as long as whole panels: the inner loops read them by the vector.
class AlongAxis {
 public:
  AlongAxis(std::int64_t length, float gain, const float* gains, const std::uint8_t* mask)
      : gain_(groups(length, kPanel) * kPanel), keep_(groups(length, kPanel) * kPanel) {
    if (!allocated()) return;
    const std::int64_t padded = groups(length, kPanel) * kPanel;
    std::fill(gain_.data(), gain_.data() + padded, gain);
    std::fill(keep_.data(), keep_.data() + padded, std::uint8_t{0});
    if (gains != nullptr) std::copy(gains, gains + length, gain_.data());
    if (mask != nullptr) std::copy(mask, mask + length, keep_.data());
  }
  bool allocated() const { return gain_ && keep_; }
  const float* gain(std::int64_t i) const { return gain_.data() + i; }
  const std::uint8_t* keep(std::int64_t i) const { return keep_.data() + i; }

 private:
  Buffer<float> gain_;
  Buffer<std::uint8_t> keep_;
};

Status merge(const ConstMatrix& w, const LowRankUpdate& update, const AlongAxis& along, MaskAxis axis,
             const Matrix& out) {
  Operands operands(w, update);
  if (!operands.allocated() || !along.allocated()) return kOutOfMemory;
  operands.pack_right();
  const int dtype = static_cast<int>(w.dtype);
  const auto merge_block = operands.pairs() ? kernels().low_rank_pair_merge[dtype] : kernels().low_rank_merge[dtype];
  const bool by_row = axis == MaskAxis::output;
  operands.for_each_block([&](std::int64_t, const LowRankBlock& block, std::int64_t row, std::int64_t column) {
    const std::int64_t i = by_row ? row : column;
    char* target =
        static_cast<char*>(out.data) + (row * out.row_stride + column) * static_cast<std::int64_t>(size_of(out.dtype));
    merge_block(block, {along.gain(i), along.keep(i), by_row, target, out.row_stride});
  });
  return {};
}

std::int64_t length_of(MaskAxis axis, const Matrix& out) { return axis == MaskAxis::input ? out.columns : out.rows; }

}  // namespace

Status low_rank_scores(ConstMatrix w_old, LowRankUpdate update, ColumnScores result) {
  HPA_RETURN_UNLESS_OK(check_low_rank_scores(w_old, update, result));
  const std::int64_t columns = w_old.columns;
  Operands operands(w_old, update);
  const std::int64_t strips = operands.strips(), tasks = strips * operands.blocks();
  Buffer<float> squared(strips * columns);
  Buffer<double> scalars(tasks * 2);
  if (!operands.allocated() || !squared || !scalars) return kOutOfMemory;
  operands.pack_right();

  const int dtype = static_cast<int>(w_old.dtype);
  const auto score_block = operands.pairs() ? kernels().low_rank_pair_scores[dtype] : kernels().low_rank_scores[dtype];
  operands.for_each_block([&](std::int64_t task, const LowRankBlock& block, std::int64_t row, std::int64_t column) {
    float* sums = squared.data() + row / kStripRows * columns + column;
    double* scalar = scalars.data() + task * 2;
    if (row % kStripRows == 0) {
      std::fill(sums, sums + block.columns, 0.0f);
      scalar[0] = scalar[1] = 0;
    }
    score_block(block, sums, scalar);
  });

  constexpr std::int64_t kColumnsAtOnce = 256;
  parallel_for(groups(columns, kColumnsAtOnce), [&](std::int64_t task) {
    const std::int64_t first = task * kColumnsAtOnce, count = std::min(kColumnsAtOnce, columns - first);
    double sums[kColumnsAtOnce] = {};
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      const float* part = squared.data() + strip * columns + first;
      for (std::int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(part[j]);
    }
    for (std::int64_t j = 0; j < count; ++j) result.squared_update[first + j] = static_cast<float>(sums[j]);
  });
  double inner = 0, norm = 0;
  for (std::int64_t task = 0; task < tasks; ++task) {
    inner += scalars[task * 2];
    norm += scalars[task * 2 + 1];
  }
  *result.inner_product = static_cast<float>(inner);
  *result.old_squared_norm = static_cast<float>(norm);
  return {};
}

Status low_rank_merge(ConstMatrix w_old, LowRankUpdate update, const std::uint8_t* mask, MaskAxis axis,
                      const float* coefficient, Matrix out) {
  HPA_RETURN_UNLESS_OK(check_low_rank_merge(w_old, update, mask, axis, coefficient, out));
  if (is_empty(out)) return {};
  return merge(w_old, update, AlongAxis(length_of(axis, out), 1.0f - *coefficient, nullptr, mask), axis, out);
}

Status low_rank_add(ConstMatrix w, LowRankUpdate update, const float* gain, MaskAxis axis, Matrix out) {
  HPA_RETURN_UNLESS_OK(check_low_rank_add(w, update, axis, out));
  if (is_empty(out)) return {};
  return merge(w, update, AlongAxis(length_of(axis, out), 1.0f, gain, nullptr), axis, out);
}

}  // namespace hpa::cpu
