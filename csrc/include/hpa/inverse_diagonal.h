// inverse_diagonal: the diagonal of (H + damping * mean(diag H) * I)^-1 for a batch of symmetric matrices.
//
// H is scaled to unit diagonal, A = D^-1/2 (H + delta I) D^-1/2 = L L^T, and [H^-1]_jj is the squared norm of
// column j of L^-1, divided by D_jj. The inverse is never formed. One call is one attempt in one precision;
// whoever calls decides what to do about a matrix that failed (hpa_ext/ops/inverse_diagonal.py).
#pragma once

#include "hpa/types.h"

namespace hpa {

enum class Precision : std::int32_t { float32 = 0, float64 = 1 };

struct MatrixBatch {
  const float* data;  // [batch, size, size] float32, symmetric; only the lower triangle is read
  std::int64_t batch;
  std::int64_t size;
  std::int64_t batch_stride;  // elements
  std::int64_t row_stride;    // elements
};

struct InverseDiagonalResult {
  float* diagonal;             // [batch, size] contiguous; NaN where the matrix failed
  std::int32_t* failed_minor;  // [batch] 0: success; k > 0: leading minor k is not positive; -1: NaN or Inf in H
  float* smallest_pivot;       // [batch] min_j L_jj^2 of the unit-diagonal matrix: near 0 means few digits left
};

// The same for S = X^T X from its rows X, without S: cheaper while the tokens are fewer than the features.
struct RowsDiagonalResult {
  float* diagonal;             // [in] diag((S + delta I)^-1), delta = damping * mean(diag S); NaN where it failed
  float* squares;              // [in] diag S
  std::int32_t* failed_minor;  // [] 0: success; k > 0: a factorisation failed at minor k, or S is zero; -1: NaN or Inf
  float* smallest_pivot;       // [] of the unit-diagonal matrices that were factored
  float* smallest_remainder;   // [] min_j of what is left of 1 in 1 - x_j^T G^-1 x_j: near 0 means few digits left
};

namespace cpu {

// damping >= 0, relative to mean(diag H) of each matrix. A dead column (H_jj = 0) is regular once damping > 0.
Status inverse_diagonal(MatrixBatch h, double damping, Precision precision, InverseDiagonalResult result);

// x [tokens, in]; damping > 0; at least one token. float32. The relative error is below some eps / (smallest_pivot *
// smallest_remainder); whoever calls decides whether that suffices. inverse_diagonal_rows.cpp has the derivation.
Status inverse_diagonal_of_rows(ConstMatrix x, double damping, RowsDiagonalResult result);

}  // namespace cpu
namespace cuda {

std::size_t inverse_diagonal_workspace_bytes(std::int64_t batch, std::int64_t size, Precision precision);
Status inverse_diagonal(MatrixBatch h, double damping, Precision precision, InverseDiagonalResult result,
                        void* workspace, Stream stream);

}  // namespace cuda
}  // namespace hpa
