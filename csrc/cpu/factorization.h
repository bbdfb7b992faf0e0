// Cholesky factorization of the unit-diagonal matrix D^-1/2 (H + delta I) D^-1/2, and the column norms of L^-1.
#pragma once

#include <atomic>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {

// Everything lies in panels of kPanel rows: panel p is [k][kPanel] for k up to its own diagonal block, so that L
// takes half a square and every block is read in the order in which the products want it. The size is padded to
// whole panels with rows of the identity. Block boundaries depend on the size alone, and so do the results.
template <typename T>
class Factorization {
 public:
  // h [size, size] float32, lower triangle; damped_diagonal [size] is D. Neither is copied. L, D^-1/2 and the
  // reciprocals of L's diagonal follow each other in `storage`, storage_size(size) elements, or where that is null in
  // memory of its own.
  Factorization(const float* h, std::int64_t row_stride, std::int64_t size, const double* damped_diagonal,
                T* storage = nullptr);

  static std::int64_t storage_size(std::int64_t size);
  bool has_memory() const { return storage_ != nullptr; }
  std::int64_t padded_size() const { return panels_ * kPanel; }

  // Fills the panels with the scaled matrix; false where H holds NaN or Inf.
  bool pack();
  // Returns 0, or the 1-based leading minor that is not positive.
  std::int32_t factor(T* smallest_pivot);
  // norms [padded_size] = column norms of L^-1, squared; false without memory.
  bool inverse_column_norms(double* norms);
  // Y := L^-1 D^-1/2 Y for `count` dense panels y[q][padded_size][kPanel], on the calling thread. Rows past the size
  // must be finite.
  void solve_scaled(T* y, std::int64_t count);

 private:
  // L[rows of panel p][columns k...]: kPanel values for each k.
  T* panel(std::int64_t p, std::int64_t k) { return l_ + (p * (p + 1) / 2 * kPanel + k) * kPanel; }

  bool pack_panel(std::int64_t p);
  std::int32_t factor_diagonal(std::int64_t first, std::int64_t last, T* smallest_pivot);
  void update(std::int64_t p, std::int64_t first, std::int64_t last, std::int64_t k, std::int64_t depth);
  void solve_columns(std::int64_t first, std::int64_t last, T* y, double* norms);
  void substitute(std::int64_t first, std::int64_t count, bool triangular, T* y);

  const float* h_;
  std::int64_t row_stride_, size_, panels_;
  const double* damped_diagonal_;
  const FactorKernels<T>& loops_;
  Buffer<T> own_;
  T* const storage_;
  T *const l_, *const scale_, *const reciprocals_;  // parts of it
};

extern template class Factorization<float>;
extern template class Factorization<double>;

}  // namespace hpa::cpu
