// Rows times the inverse of a factored matrix: Y := L^-1 Y and Y := L^-T Y for panels of right-hand sides.
//
// Both substitutions go right-looking over groups of block rows: a group is solved by the thread that has the
// right-hand sides, then all other block rows take its products, each by one thread. So even a few right-hand sides
// keep all threads busy, and every sum has an order that depends on the size alone.
#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/factorization.h"
#include "hpa/cholesky.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kGroup = 4;        // block rows of a group
constexpr std::int64_t kMostPanels = 24;  // right-hand side panels in memory at a time: rows are taken in passes
constexpr std::int64_t kBlock = kPanel * kPanel;

std::int64_t ceiling(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// L^T of a diagonal block with rows and columns in reverse order, which is lower triangular again.
void reverse(const float* block, float* out) {
  for (std::int64_t c = 0; c < kPanel; ++c) {
    for (std::int64_t r = c; r < kPanel; ++r) out[(kPanel - 1 - r) * kPanel + kPanel - 1 - c] = block[c * kPanel + r];
  }
}

void reverse_rows(float* x) {
  for (std::int64_t r = 0; r < kPanel / 2; ++r) {
    std::swap_ranges(x + r * kPanel, x + (r + 1) * kPanel, x + (kPanel - 1 - r) * kPanel);
  }
}

class Solver {
 public:
  Solver(const float* factor, std::int64_t size)
      : l_(factor),
        size_(size),
        panels_(ceiling(size, kPanel)),
        scale_(l_ + panels_ * (panels_ + 1) / 2 * kBlock),
        reciprocals_(scale_ + panels_ * kPanel),
        loops_(kernels().factor_f32),
        slots_(slot_count()),
        scratch_(slots_ * kGroup * kBlock) {
    std::fill(ones_, ones_ + kPanel, 1.0f);
  }

  bool has_memory() const { return static_cast<bool>(scratch_); }
  std::int64_t panels() const { return panels_; }

  // y[q][padded size][kPanel]: `count` panels of right-hand sides.
  void forward(float* y, std::int64_t count) {
    for (std::int64_t first = 0; first < panels_; first += kGroup) {
      const std::int64_t last = std::min(first + kGroup, panels_), depth = (last - first) * kPanel;
      parallel_for(count, [&](std::int64_t q) {
        for (std::int64_t p = first; p < last; ++p) {
          if (p > first) {
            loops_.subtract_product((p - first) * kPanel, panel(p, first * kPanel), rows_of(y, q, first),
                                    rows_of(y, q, p));
          }
          loops_.solve(panel(p, p * kPanel), reciprocals_ + p * kPanel, rows_of(y, q, p));
        }
      });
      parallel_for(panels_ - last, [&](std::int64_t task) {
        const std::int64_t p = last + task;
        for (std::int64_t q = 0; q < count; ++q) {
          loops_.subtract_product(depth, panel(p, first * kPanel), rows_of(y, q, first), rows_of(y, q, p));
        }
      });
    }
  }

  void backward(float* y, std::int64_t count) {
    for (std::int64_t last = panels_; last > 0; last -= std::min(last, kGroup)) {
      const std::int64_t first = std::max<std::int64_t>(last - kGroup, 0), depth = (last - first) * kPanel;
      solve_group_transposed(first, last, y, count);
      parallel_for(first, slots_, [&](std::int64_t p, std::int64_t slot) {
        float* across = scratch(slot);
        for (std::int64_t row = first; row < last; ++row) {
          transpose(panel(row, p * kPanel), across + (row - first) * kBlock);
        }
        for (std::int64_t q = 0; q < count; ++q) {
          loops_.subtract_product(depth, across, rows_of(y, q, first), rows_of(y, q, p));
        }
      });
    }
  }

  // The rows [first, first + count) of x times D^-1/2, as panels; lanes and rows past the end are zeros.
  void pack(const ConstMatrix& x, std::int64_t first, std::int64_t count, float* y) const {
    const float* data = static_cast<const float*>(x.data);
    const std::int64_t whole = size_ / 4 * 4;
    parallel_for(ceiling(count, kPanel), [&](std::int64_t q) {
      const std::int64_t begin = first + q * kPanel, rows = std::min(kPanel, first + count - begin);
      const float* row = data + begin * x.row_stride;
      float *panel = rows_of(y, q, 0), lanes[kPanel] = {};
      std::fill(lanes, lanes + rows, 1.0f);
      loops_.pack_scaled(row, x.row_stride, rows, whole, lanes, scale_, panel);
      std::fill(panel + whole * kPanel, panel + panels_ * kBlock, 0.0f);
      for (std::int64_t k = whole; k < size_; ++k) {
        for (std::int64_t r = 0; r < rows; ++r) panel[k * kPanel + r] = row[r * x.row_stride + k] * scale_[k];
      }
    });
  }

  void unpack(float* y, std::int64_t first, std::int64_t count, const Matrix& out) {
    float* data = static_cast<float*>(out.data);
    parallel_for(ceiling(count, kPanel), slots_, [&](std::int64_t q, std::int64_t slot) {
      const std::int64_t begin = first + q * kPanel, rows = std::min(kPanel, first + count - begin);
      float* block = scratch(slot);
      for (std::int64_t p = 0; p < panels_; ++p) {
        const std::int64_t columns = std::min(kPanel, size_ - p * kPanel);
        loops_.pack_scaled(rows_of(y, q, p), kPanel, kPanel, kPanel, scale_ + p * kPanel, ones_, block);
        for (std::int64_t r = 0; r < rows; ++r) {
          std::copy_n(block + r * kPanel, columns, data + (begin + r) * out.row_stride + p * kPanel);
        }
      }
    });
  }

 private:
  const float* panel(std::int64_t p, std::int64_t k) const { return l_ + (p * (p + 1) / 2 * kPanel + k) * kPanel; }
  float* rows_of(float* y, std::int64_t q, std::int64_t p) const { return y + (q * panels_ + p) * kBlock; }
  float* scratch(std::int64_t slot) { return scratch_.data() + slot * kGroup * kBlock; }
  void transpose(const float* block, float* out) const {
    loops_.pack_scaled(block, kPanel, kPanel, kPanel, ones_, ones_, out);
  }

  // The square of block rows [first, last) of L^T, from the last one up.
  void solve_group_transposed(std::int64_t first, std::int64_t last, float* y, std::int64_t count) {
    float* block = scratch(0);
    float reciprocals[kPanel];
    for (std::int64_t p = last - 1; p >= first; --p) {
      for (std::int64_t row = p + 1; row < last; ++row) {
        transpose(panel(row, p * kPanel), block);
        parallel_for(count, [&](std::int64_t q) {
          loops_.subtract_product(kPanel, block, rows_of(y, q, row), rows_of(y, q, p));
        });
      }
      reverse(panel(p, p * kPanel), block);
      std::reverse_copy(reciprocals_ + p * kPanel, reciprocals_ + (p + 1) * kPanel, reciprocals);
      parallel_for(count, [&](std::int64_t q) {
        float* x = rows_of(y, q, p);
        reverse_rows(x);
        loops_.solve(block, reciprocals, x);
        reverse_rows(x);
      });
    }
  }

  const float* l_;
  const std::int64_t size_, panels_;
  const float *scale_, *reciprocals_;
  const FactorKernels<float>& loops_;
  const std::int64_t slots_;
  Buffer<float> scratch_;
  float ones_[kPanel];
};

Status check(const float* factor, const ConstMatrix& rows, const Matrix& out) {
  HPA_REQUIRE_MATRIX(rows);
  HPA_REQUIRE_MATRIX(out);
  HPA_REQUIRE_SAME_SHAPE(rows, out);
  HPA_REQUIRE(rows.dtype == DType::float32, "rows: dtype must be float32");
  HPA_REQUIRE(is_same_or_apart(rows, out), "out: row_stride must be that of rows where out is rows");
  HPA_REQUIRE(factor != nullptr || is_empty(rows), "factor: must not be null");
  return {};
}

}  // namespace

Status cholesky_solve(const float* factor, ConstMatrix rows, Matrix out) {
  HPA_RETURN_UNLESS_OK(check(factor, rows, out));
  if (rows.rows == 0 || rows.columns == 0) return {};
  Solver solver(factor, rows.columns);
  const std::int64_t most = std::min(kMostPanels, ceiling(rows.rows, kPanel));
  Buffer<float> y(most * solver.panels() * kBlock);
  if (!solver.has_memory() || !y) return kOutOfMemory;
  for (std::int64_t first = 0; first < rows.rows; first += most * kPanel) {
    const std::int64_t count = std::min(most * kPanel, rows.rows - first), panels = ceiling(count, kPanel);
    solver.pack(rows, first, count, y.data());
    solver.forward(y.data(), panels);
    solver.backward(y.data(), panels);
    solver.unpack(y.data(), first, count, out);
  }
  return {};
}

}  // namespace hpa::cpu
