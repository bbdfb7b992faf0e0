// cholesky and cholesky_solve: a symmetric matrix is factored once, and rows are multiplied with its inverse from the
// right, as often as wanted.
//
// S is scaled to unit diagonal, D^-1/2 S D^-1/2 = L L^T, and rows S^-1 = rows D^-1/2 L^-T L^-1 D^-1/2. The factor is
// one block of memory that belongs to the caller: L in the order in which the kernels read it, half a square, with
// D^-1/2 and the reciprocals of L's diagonal. Only the same build reads it. In host memory alone.
#pragma once

#include "hpa/types.h"

namespace hpa {

struct CholeskyResult {
  float* factor;               // cholesky_factor_size(size) elements
  std::int32_t* failed_minor;  // [] 0: success; k > 0: leading minor k is not positive; -1: NaN or Inf in S
  float* smallest_pivot;       // [] min_j L_jj^2 of the unit-diagonal matrix: near 0 means few digits left
};

namespace cpu {

// Elements of the factor of a matrix [size, size].
std::int64_t cholesky_factor_size(std::int64_t size);

// s [size, size] float32, symmetric; only the lower triangle is read, without its diagonal, which is `diagonal` [size].
Status cholesky(ConstMatrix s, const double* diagonal, CholeskyResult result);

// out [rows, size] = rows [rows, size] S^-1, float32, with a factor that succeeded; out may be the memory of rows.
Status cholesky_solve(const float* factor, ConstMatrix rows, Matrix out);

}  // namespace cpu
}  // namespace hpa
