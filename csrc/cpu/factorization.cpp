#include "cpu/factorization.h"

#include <algorithm>
#include <cmath>

namespace hpa::cpu {
namespace {

// Columns (or rows) whose products are summed in registers before they are subtracted.
constexpr std::int64_t kDepth = 5 * kPanel;
// Row panels that share one reading of L in the substitution.
constexpr std::int64_t kRowPanels = 4;

template <typename T>
const FactorKernels<T>& loops_of(const Kernels& kernels) {
  if constexpr (std::is_same_v<T, float>) {
    return kernels.factor_f32;
  } else {
    return kernels.factor_f64;
  }
}

std::int64_t ceiling(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <typename T>
Factorization<T>::Factorization(const float* h, std::int64_t row_stride, std::int64_t size,
                                const double* damped_diagonal, T* storage)
    : h_(h),
      row_stride_(row_stride),
      size_(size),
      panels_(ceiling(size, kPanel)),
      damped_diagonal_(damped_diagonal),
      loops_(loops_of<T>(kernels())),
      own_(storage == nullptr ? storage_size(size) : 0),
      storage_(storage == nullptr ? own_.data() : storage),
      l_(storage_),
      scale_(l_ + panels_ * (panels_ + 1) / 2 * kPanel * kPanel),
      reciprocals_(scale_ + panels_ * kPanel) {}

template <typename T>
std::int64_t Factorization<T>::storage_size(std::int64_t size) {
  const std::int64_t panels = ceiling(size, kPanel);
  return (panels * (panels + 1) / 2 * kPanel + 2 * panels) * kPanel;
}

template <typename T>
bool Factorization<T>::pack_panel(std::int64_t p) {
  const std::int64_t first = p * kPanel, rows = std::min(kPanel, size_ - first);
  bool finite =
      loops_.pack_scaled(h_ + first * row_stride_, row_stride_, rows, first, scale_ + first, scale_, panel(p, 0));
  T* block = panel(p, first);
  for (std::int64_t k = 0; k < kPanel; ++k) {
    for (std::int64_t r = k; r < kPanel; ++r) {
      if (r >= rows) {
        block[k * kPanel + r] = r == k ? T{1} : T{0};
        continue;
      }
      const float value = h_[(first + r) * row_stride_ + first + k];
      finite = finite && std::isfinite(value);
      block[k * kPanel + r] = static_cast<T>(value) * scale_[first + r] * scale_[first + k];
    }
    // The scaled diagonal is exactly 1; an entry that is not positive is kept, for it decides the failing minor.
    if (k < rows) {
      const double entry = damped_diagonal_[first + k];
      block[k * kPanel + k] = entry > 0 ? T{1} : static_cast<T>(entry);
    }
    std::fill(block + k * kPanel, block + k * kPanel + k, T{0});
  }
  return finite;
}

template <typename T>
bool Factorization<T>::pack() {
  for (std::int64_t j = 0; j < panels_ * kPanel; ++j) {
    const double entry = j < size_ ? damped_diagonal_[j] : 0;
    scale_[j] = j >= size_ ? T{0} : entry > 0 ? static_cast<T>(1 / std::sqrt(entry)) : T{1};
  }
  std::atomic<bool> finite{true};
  parallel_for(panels_, [&](std::int64_t task) {
    if (!pack_panel(panels_ - 1 - task)) finite = false;  // the longest first
  });
  return finite;
}

// Subtracts from panel p, in the columns of panels [first, last), the products over columns [k, k + depth) of L.
template <typename T>
void Factorization<T>::update(std::int64_t p, std::int64_t first, std::int64_t last, std::int64_t k,
                              std::int64_t depth) {
  for (std::int64_t q = first; q < last; ++q) {
    loops_.subtract_product(depth, panel(q, k), panel(p, k), panel(p, q * kPanel));
  }
}

// The square of panels [first, last), whose updates from the left are done.
template <typename T>
std::int32_t Factorization<T>::factor_diagonal(std::int64_t first, std::int64_t last, T* smallest_pivot) {
  for (std::int64_t q = first; q < last; ++q) {
    for (std::int64_t p = q; p < last; ++p) {
      if (q > first) {
        loops_.subtract_product((q - first) * kPanel, panel(q, first * kPanel), panel(p, first * kPanel),
                                panel(p, q * kPanel));
      }
      if (p == q) {
        const std::int32_t failed = loops_.factor(panel(q, q * kPanel), reciprocals_ + q * kPanel, smallest_pivot);
        if (failed != 0) return static_cast<std::int32_t>(q * kPanel) + failed;
      } else {
        loops_.solve(panel(q, q * kPanel), reciprocals_ + q * kPanel, panel(p, q * kPanel));
      }
    }
  }
  return 0;
}

// Left-looking: a block column takes all its updates at once, so that of L nothing is written twice.
template <typename T>
std::int32_t Factorization<T>::factor(T* smallest_pivot) {
  const std::int64_t width = panels_ >= 64 ? 4 : 2, slots = slot_count();
  *smallest_pivot = 1;
  for (std::int64_t first = 0; first < panels_; first += width) {
    const std::int64_t last = std::min(first + width, panels_), left = first * kPanel;
    parallel_for(last - first, slots, [&](std::int64_t task, std::int64_t) {
      for (std::int64_t k = 0; k < left; k += kDepth) {
        update(first + task, first, first + task + 1, k, std::min(kDepth, left - k));
      }
    });
    if (const std::int32_t failed = factor_diagonal(first, last, smallest_pivot); failed != 0) return failed;

    const std::int64_t below = panels_ - last;
    const std::int64_t together = std::clamp<std::int64_t>(below / (4 * slots), 1, 4);
    parallel_for(ceiling(below, together), slots, [&](std::int64_t task, std::int64_t) {
      const std::int64_t begin = last + task * together, end = std::min(begin + together, panels_);
      for (std::int64_t k = 0; k < left; k += kDepth) {
        for (std::int64_t p = begin; p < end; ++p) update(p, first, last, k, std::min(kDepth, left - k));
      }
      for (std::int64_t p = begin; p < end; ++p) {
        for (std::int64_t q = first; q < last; ++q) {
          if (q > first) update(p, q, q + 1, left, (q - first) * kPanel);
          loops_.solve(panel(q, q * kPanel), reciprocals_ + q * kPanel, panel(p, q * kPanel));
        }
      }
    });
  }
  return 0;
}

// Y := L^-1 Y by forward substitution, in the rows from panel `first` on: y holds `count` panels of
// [panels_ - first][kPanel] blocks, zero above. Triangular: panel q is zero above block first + q too.
template <typename T>
void Factorization<T>::substitute(std::int64_t first, std::int64_t count, bool triangular, T* y) {
  const std::int64_t y_stride = (panels_ - first) * kPanel * kPanel;
  const auto rows_of = [&](std::int64_t q, std::int64_t k) { return y + q * y_stride + (k - first * kPanel) * kPanel; };
  const auto start = [&](std::int64_t q) { return triangular ? first + q : first; };
  const auto eliminate = [&](std::int64_t p, std::int64_t k_begin, std::int64_t k_end) {
    for (std::int64_t q = 0; q < count; ++q) {
      const std::int64_t k = std::max(k_begin, start(q) * kPanel);
      if (k < k_end) loops_.subtract_product(k_end - k, panel(p, k), rows_of(q, k), rows_of(q, p * kPanel));
    }
  };
  for (std::int64_t group = first / kRowPanels * kRowPanels; group < panels_; group += kRowPanels) {
    const std::int64_t begin = std::max(group, first), end = std::min(group + kRowPanels, panels_);
    for (std::int64_t k = first * kPanel / kDepth * kDepth; k < group * kPanel; k += kDepth) {
      for (std::int64_t p = begin; p < end; ++p) eliminate(p, k, std::min(k + kDepth, group * kPanel));
    }
    for (std::int64_t p = begin; p < end; ++p) {
      eliminate(p, group * kPanel, p * kPanel);
      for (std::int64_t q = 0; q < count && start(q) <= p; ++q) {
        loops_.solve(panel(p, p * kPanel), reciprocals_ + p * kPanel, rows_of(q, p * kPanel));
      }
    }
  }
}

template <typename T>
void Factorization<T>::solve_scaled(T* y, std::int64_t count) {
  const std::int64_t rows = panels_ * kPanel;
  for (std::int64_t q = 0; q < count; ++q) {
    for (std::int64_t k = 0; k < rows; ++k) {
      T* row = y + (q * rows + k) * kPanel;
      for (std::int64_t j = 0; j < kPanel; ++j) row[j] *= scale_[k];
    }
  }
  substitute(0, count, false, y);
}

// Columns of panels [first, last) of Y = L^-1, by substitution on the identity.
template <typename T>
void Factorization<T>::solve_columns(std::int64_t first, std::int64_t last, T* y, double* norms) {
  const std::int64_t y_stride = (panels_ - first) * kPanel * kPanel;
  std::fill(y, y + (last - first) * y_stride, T{0});
  for (std::int64_t q = first; q < last; ++q) {
    T* diagonal_block = y + (q - first) * y_stride + (q - first) * kPanel * kPanel;
    for (std::int64_t k = 0; k < kPanel; ++k) diagonal_block[k * kPanel + k] = 1;
  }
  substitute(first, last - first, true, y);
  for (std::int64_t q = first; q < last; ++q) {
    const T* own_rows = y + (q - first) * y_stride + (q - first) * kPanel * kPanel;
    loops_.column_norms((panels_ - q) * kPanel, own_rows, norms + q * kPanel);
  }
}

template <typename T>
bool Factorization<T>::inverse_column_norms(double* norms) {
  const std::int64_t slots = std::min(slot_count(), panels_);
  const std::int64_t together = std::clamp<std::int64_t>(panels_ / (8 * slots), 1, 4);
  const std::int64_t tasks = ceiling(panels_, together);
  const std::int64_t scratch = together * panels_ * kPanel * kPanel;
  Buffer<T> y(slots * scratch);
  if (!y) return false;
  parallel_for(tasks, slots, [&](std::int64_t task, std::int64_t slot) {
    const std::int64_t first = task * together;
    solve_columns(first, std::min(first + together, panels_), y.data() + slot * scratch, norms);
  });
  return true;
}

template class Factorization<float>;
template class Factorization<double>;

}  // namespace hpa::cpu
