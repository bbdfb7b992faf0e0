#include "hpa/cholesky.h"

#include <cmath>
#include <limits>

#include "cpu/checks.h"
#include "cpu/factorization.h"

namespace hpa::cpu {
namespace {

Status check(const ConstMatrix& s, const double* diagonal, const CholeskyResult& result) {
  HPA_REQUIRE_MATRIX(s);
  HPA_REQUIRE(s.dtype == DType::float32, "s: dtype must be float32");
  HPA_REQUIRE(s.rows == s.columns && s.rows < 0x7fffffff, "s: must be square, with fewer than 2^31 - 1 rows");
  HPA_REQUIRE(result.failed_minor != nullptr, "failed_minor: must not be null");
  HPA_REQUIRE(result.smallest_pivot != nullptr, "smallest_pivot: must not be null");
  HPA_REQUIRE(diagonal != nullptr || s.rows == 0, "diagonal: must not be null");
  HPA_REQUIRE(result.factor != nullptr || s.rows == 0, "factor: must not be null");
  return {};
}

}  // namespace

std::int64_t cholesky_factor_size(std::int64_t size) { return Factorization<float>::storage_size(size); }

Status cholesky(ConstMatrix s, const double* diagonal, CholeskyResult result) {
  HPA_RETURN_UNLESS_OK(check(s, diagonal, result));
  *result.failed_minor = 0;
  *result.smallest_pivot = 1;
  if (s.rows == 0) return {};
  Factorization<float> factorization(static_cast<const float*>(s.data), s.row_stride, s.rows, diagonal, result.factor);
  bool finite = factorization.pack();
  for (std::int64_t j = 0; finite && j < s.rows; ++j) finite = std::isfinite(diagonal[j]);
  if (!finite) {
    *result.failed_minor = -1;
    *result.smallest_pivot = std::numeric_limits<float>::quiet_NaN();
    return {};
  }
  *result.failed_minor = factorization.factor(result.smallest_pivot);
  return {};
}

}  // namespace hpa::cpu
