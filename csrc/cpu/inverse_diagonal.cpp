#include "hpa/inverse_diagonal.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/factorization.h"

namespace hpa::cpu {
namespace {

// Smaller matrices of a batch are divided among the threads; larger ones take all threads one after the other.
constexpr std::int64_t kLarge = 512;

template <typename T>
bool one_matrix(const MatrixBatch& h, std::int64_t index, double damping, const InverseDiagonalResult& result) {
  const std::int64_t size = h.size;
  float* diagonal = result.diagonal + index * size;
  const auto fail = [&](std::int32_t minor, float pivot) {
    std::fill(diagonal, diagonal + size, std::numeric_limits<float>::quiet_NaN());
    result.failed_minor[index] = minor;
    result.smallest_pivot[index] = pivot;
    return true;
  };
  const float* matrix = h.data + index * h.batch_stride;
  Buffer<double> damped(size);  // D = diag H + delta
  if (!damped) return false;

  double mean = 0;
  for (std::int64_t j = 0; j < size; ++j) mean += static_cast<double>(matrix[j * h.row_stride + j]);
  mean /= static_cast<double>(size);
  if (!std::isfinite(mean)) return fail(-1, std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t j = 0; j < size; ++j) {
    damped[j] = static_cast<double>(matrix[j * h.row_stride + j]) + damping * mean;
  }

  Factorization<T> factorization(matrix, h.row_stride, size, damped.data());
  if (!factorization.has_memory()) return false;
  if (!factorization.pack()) return fail(-1, std::numeric_limits<float>::quiet_NaN());
  T smallest_pivot = 0;
  const std::int32_t failed_minor = factorization.factor(&smallest_pivot);
  if (failed_minor != 0) return fail(failed_minor, static_cast<float>(smallest_pivot));

  Buffer<double> norms(factorization.padded_size());
  if (!norms || !factorization.inverse_column_norms(norms.data())) return false;
  for (std::int64_t j = 0; j < size; ++j) diagonal[j] = static_cast<float>(norms[j] / damped[j]);
  result.failed_minor[index] = 0;
  result.smallest_pivot[index] = static_cast<float>(smallest_pivot);
  return true;
}

template <typename T>
Status all_matrices(const MatrixBatch& h, double damping, const InverseDiagonalResult& result) {
  std::atomic<bool> has_memory{true};
  const auto one = [&](std::int64_t index) {
    if (!one_matrix<T>(h, index, damping, result)) has_memory = false;
  };
  if (h.batch > 1 && h.size < kLarge) {
    parallel_for(h.batch, one);
  } else {
    for (std::int64_t index = 0; index < h.batch; ++index) one(index);
  }
  return has_memory ? Status{} : kOutOfMemory;
}

}  // namespace

Status inverse_diagonal(MatrixBatch h, double damping, Precision precision, InverseDiagonalResult result) {
  HPA_RETURN_UNLESS_OK(check_inverse_diagonal(h, damping, precision, result));
  if (h.size == 0) {
    for (std::int64_t index = 0; index < h.batch; ++index) {
      result.failed_minor[index] = 0;
      result.smallest_pivot[index] = 1;
    }
    return {};
  }
  return precision == Precision::float32 ? all_matrices<float>(h, damping, result)
                                         : all_matrices<double>(h, damping, result);
}

}  // namespace hpa::cpu
