// The diagonal of (X^T X + delta I)^-1 from the rows X, for fewer tokens than features.
//
// Woodbury: (X^T X + delta I)^-1 = (I - X^T G^-1 X) / delta with G = X X^T + delta I = L L^T, so that entry j is
// (1 - |L^-1 x_j|^2) / delta. For a feature far larger than the rest the difference cancels: 1 - |L^-1 x_j|^2 is then
// about delta / S_jj. Such features, M, are left out of G and joined by a second, small Woodbury step: with
// Y = L^-1 X and C C^T = I + Y_M^T Y_M, entry j is (1 - |y_j|^2 + |C^-1 Y_M^T y_j|^2) / delta outside of M, and the
// squared norm of its column of C^-1, over delta, inside.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/factorization.h"
#include "hpa/gram.h"
#include "hpa/inverse_diagonal.h"

namespace hpa::cpu {
namespace {

// Features whose square sum exceeds the mean this many times are left out of G: fewer than a tenth of all.
constexpr double kLarge = 10;
constexpr std::int64_t kBlock = 32;  // of the transposition

std::int64_t ceiling(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Columns of x as the right-hand sides of a triangular system: panels [padded][kPanel] in float32.
class RightSides {
 public:
  RightSides(const ConstMatrix& x, std::int64_t padded)
      : x_(x), padded_(padded), pack_(kernels().pack_tokens[static_cast<int>(x.dtype)]), tokens_(x.rows) {
    if (!tokens_) return;
    for (std::int64_t t = 0; t < x.rows; ++t) tokens_[t] = t;
  }
  explicit operator bool() const { return static_cast<bool>(tokens_); }

  // Panels [first, last); lanes behind the last column and rows behind the last token are zeros.
  void pack(std::int64_t first, std::int64_t last, float* out) const {
    const std::int64_t column = first * kPanel, stride = padded_ * kPanel;
    pack_(x_.data, x_.row_stride, tokens_.data(), x_.rows, column, std::min(last * kPanel, x_.columns) - column, out,
          stride);
    for (std::int64_t q = 0; q < last - first; ++q) {
      std::fill(out + q * stride + x_.rows * kPanel, out + (q + 1) * stride, 0.0f);
    }
  }

 private:
  ConstMatrix x_;
  std::int64_t padded_;
  void (*pack_)(const void*, std::int64_t, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, float*,
                std::int64_t);
  Buffer<std::int64_t> tokens_;
};

// out [columns, rows] contiguous; elements are moved as they are.
template <typename Word>
void transpose(const ConstMatrix& x, Word* out) {
  const Word* data = static_cast<const Word*>(x.data);
  const std::int64_t across = ceiling(x.columns, kBlock);
  parallel_for(across, [&](std::int64_t task) {
    const std::int64_t first = task * kBlock, last = std::min(first + kBlock, x.columns);
    for (std::int64_t t = 0; t < x.rows; t += kBlock) {
      const std::int64_t end = std::min(t + kBlock, x.rows);
      for (std::int64_t j = first; j < last; ++j) {
        for (std::int64_t row = t; row < end; ++row) out[j * x.rows + row] = data[row * x.row_stride + j];
      }
    }
  });
}

class FromRows {
 public:
  FromRows(const ConstMatrix& x, double damping, const RowsDiagonalResult& result)
      : x_(x),
        damping_(damping),
        result_(result),
        panels_(ceiling(x.columns, kPanel)),
        squares_(panels_ * kPanel),
        large_(x.columns) {}

  Status run() {
    if (!squares_ || !large_ || !square_columns()) return kOutOfMemory;
    double mean = 0;
    for (std::int64_t j = 0; j < x_.columns; ++j) mean += squares_[j];
    mean /= static_cast<double>(x_.columns);
    // Sums beyond float32 would be Inf in the Gram as well.
    if (!(mean <= std::numeric_limits<float>::max())) return fail(-1, kNotANumber);
    delta_ = damping_ * mean;
    if (!(delta_ > 0)) return fail(1, 0);
    for (std::int64_t j = 0; j < x_.columns; ++j) {
      if (squares_[j] > kLarge * mean) large_[large_count_++] = j;
    }
    return factor_rows();
  }

 private:
  static constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

  Status fail(std::int32_t minor, float pivot) {
    std::fill(result_.diagonal, result_.diagonal + x_.columns, kNotANumber);
    *result_.failed_minor = minor;
    *result_.smallest_pivot = pivot;
    *result_.smallest_remainder = 0;
    return {};
  }

  bool square_columns() {
    const RightSides sides(x_, x_.rows);
    const std::int64_t slots = std::min(slot_count(), panels_);
    Buffer<float> packed(slots * x_.rows * kPanel);
    if (!sides || !packed) return false;
    const auto norms = kernels().factor_f32.column_norms;
    parallel_for(panels_, slots, [&](std::int64_t q, std::int64_t slot) {
      float* panel = packed.data() + slot * x_.rows * kPanel;
      sides.pack(q, q + 1, panel);
      norms(x_.rows, panel, squares_.data() + q * kPanel);
    });
    for (std::int64_t j = 0; j < x_.columns; ++j) result_.squares[j] = static_cast<float>(squares_[j]);
    return true;
  }

  // G without the large features: the Gram of the transposed rows, those masked out.
  Status factor_rows() {
    const std::int64_t rows = x_.rows;
    Buffer<float> gram(rows * rows);
    Buffer<double> damped(rows);
    if (!gram || !damped) return kOutOfMemory;
    {
      Buffer<std::uint8_t> transposed(rows * x_.columns * static_cast<std::int64_t>(size_of(x_.dtype)));
      Buffer<std::uint8_t> counts(x_.columns);
      if (!transposed || !counts) return kOutOfMemory;
      if (size_of(x_.dtype) == 4) {
        transpose(x_, reinterpret_cast<std::uint32_t*>(transposed.data()));
      } else {
        transpose(x_, reinterpret_cast<std::uint16_t*>(transposed.data()));
      }
      std::fill(counts.data(), counts.data() + x_.columns, std::uint8_t{1});
      for (std::int64_t i = 0; i < large_count_; ++i) counts[large_[i]] = 0;
      std::fill(gram.data(), gram.data() + rows * rows, 0.0f);
      HPA_RETURN_UNLESS_OK(
          gram_accumulate({transposed.data(), x_.dtype, x_.columns, rows, rows}, counts.data(), gram.data(), rows));
    }
    for (std::int64_t i = 0; i < rows; ++i) damped[i] = static_cast<double>(gram[i * rows + i]) + delta_;
    Factorization<float> factorization(gram.data(), rows, rows, damped.data());
    if (!factorization.has_memory()) return kOutOfMemory;
    if (!factorization.pack()) return fail(-1, kNotANumber);
    float pivot = 0;
    if (const std::int32_t failed = factorization.factor(&pivot); failed != 0) return fail(failed, pivot);
    *result_.smallest_pivot = pivot;
    return large_count_ == 0 ? columns(factorization, nullptr, nullptr) : join_large(factorization);
  }

  // Y_M, and the factorisation of I + Y_M^T Y_M.
  Status join_large(Factorization<float>& factorization) {
    const std::int64_t count = large_count_, panels = ceiling(count, kPanel);
    const std::int64_t padded = factorization.padded_size(), size = panels * kPanel;
    const std::size_t element = size_of(x_.dtype);
    Buffer<float> y(panels * padded * kPanel), products(size * size);
    Buffer<double> damped(count);
    {
      Buffer<std::uint8_t> gathered(x_.rows * count * static_cast<std::int64_t>(element));
      const RightSides sides({gathered.data(), x_.dtype, x_.rows, count, count}, padded);
      if (!y || !products || !damped || !gathered || !sides) return kOutOfMemory;
      const std::uint8_t* data = static_cast<const std::uint8_t*>(x_.data);
      for (std::int64_t t = 0; t < x_.rows; ++t) {
        for (std::int64_t i = 0; i < count; ++i) {
          std::copy_n(data + (t * x_.row_stride + large_[i]) * element, element,
                      gathered.data() + (t * count + i) * element);
        }
      }
      sides.pack(0, panels, y.data());
    }
    parallel_for(panels, [&](std::int64_t q) { factorization.solve_scaled(y.data() + q * padded * kPanel, 1); });
    std::fill(products.data(), products.data() + size * size, 0.0f);
    parallel_for(panels, [&](std::int64_t p) {
      multiply(y.data(), panels, padded, y.data() + p * padded * kPanel, products.data() + p * kPanel, size);
    });
    for (std::int64_t i = 0; i < count; ++i) damped[i] = static_cast<double>(products[i * size + i]) + 1;

    Factorization<float> small(products.data(), size, count, damped.data());
    Buffer<double> norms(panels * kPanel);
    if (!small.has_memory() || !norms) return kOutOfMemory;
    if (!small.pack()) return fail(-1, kNotANumber);
    float pivot = 0;
    if (const std::int32_t failed = small.factor(&pivot); failed != 0) return fail(failed, pivot);
    *result_.smallest_pivot = std::min(*result_.smallest_pivot, pivot);
    if (!small.inverse_column_norms(norms.data())) return kOutOfMemory;
    const Status status = columns(factorization, &small, y.data());
    if (!status.ok()) return status;
    for (std::int64_t i = 0; i < count; ++i) {
      result_.diagonal[large_[i]] = static_cast<float>(norms[i] / damped[i] / delta_);
    }
    return {};
  }

  // out[i * out_stride + j] += sum over k of left[i][k] right[j][k], for the columns i of `count` panels and j of one.
  static void multiply(const float* left, std::int64_t count, std::int64_t depth, const float* right, float* out,
                       std::int64_t out_stride) {
    constexpr std::int64_t kDepth = 256;
    for (std::int64_t k = 0; k < depth; k += kDepth) {
      for (std::int64_t p = 0; p < count; ++p) {
        kernels().add_product(std::min(kDepth, depth - k), left + (p * depth + k) * kPanel, right + k * kPanel,
                              out + p * kPanel * out_stride, out_stride);
      }
    }
  }

  // All columns, some panels at a time, so that they share one reading of L.
  Status columns(Factorization<float>& factorization, Factorization<float>* small, const float* large) {
    const std::int64_t padded = factorization.padded_size(), slots = std::min(slot_count(), panels_);
    const std::int64_t together = std::clamp<std::int64_t>(panels_ / (4 * slots), 1, 4);
    const std::int64_t small_rows = small != nullptr ? small->padded_size() : 0;
    const std::int64_t scratch = (together * padded + small_rows) * kPanel;
    const RightSides sides(x_, padded);
    Buffer<float> y(slots * scratch);
    Buffer<double> remainders(panels_ * kPanel);
    if (!sides || !y || !remainders) return kOutOfMemory;
    parallel_for(ceiling(panels_, together), slots, [&](std::int64_t task, std::int64_t slot) {
      const std::int64_t first = task * together, last = std::min(first + together, panels_);
      float *panels = y.data() + slot * scratch, *z = panels + together * padded * kPanel;
      sides.pack(first, last, panels);
      factorization.solve_scaled(panels, last - first);
      for (std::int64_t q = first; q < last; ++q) {
        const float* panel = panels + (q - first) * padded * kPanel;
        double norms[kPanel], joined[kPanel] = {};
        kernels().factor_f32.column_norms(padded, panel, norms);
        if (small != nullptr) {
          std::fill(z, z + small_rows * kPanel, 0.0f);
          multiply(large, small_rows / kPanel, padded, panel, z, kPanel);
          small->solve_scaled(z, 1);
          kernels().factor_f32.column_norms(small_rows, z, joined);
        }
        for (std::int64_t i = 0; i < kPanel; ++i) remainders[q * kPanel + i] = 1 - norms[i] + joined[i];
      }
    });
    for (std::int64_t i = 0; i < large_count_; ++i) remainders[large_[i]] = 1;  // theirs come from the small factor
    double smallest = 1;
    for (std::int64_t j = 0; j < x_.columns; ++j) {
      smallest = std::min(smallest, remainders[j]);
      result_.diagonal[j] = static_cast<float>(remainders[j] / delta_);
    }
    *result_.failed_minor = 0;
    *result_.smallest_remainder = static_cast<float>(smallest);
    return {};
  }

  const ConstMatrix x_;
  const double damping_;
  const RowsDiagonalResult result_;
  const std::int64_t panels_;
  Buffer<double> squares_;
  Buffer<std::int64_t> large_;  // M, large_count_ of them
  std::int64_t large_count_ = 0;
  double delta_ = 0;
};

}  // namespace

Status inverse_diagonal_of_rows(ConstMatrix x, double damping, RowsDiagonalResult result) {
  HPA_RETURN_UNLESS_OK(check_inverse_diagonal_of_rows(x, damping, result));
  if (x.columns == 0) {
    *result.failed_minor = 0;
    *result.smallest_pivot = *result.smallest_remainder = 1;
    return {};
  }
  return FromRows(x, damping, result).run();
}

}  // namespace hpa::cpu
