// column_scores: the sums over a pair of weights that HPA's scores and projection need, in one pass.
// With D = w_new - w_old: sum_i D_ij^2 for every column j, <D, w_old> and ||w_old||_F^2 (HPA sections 3.1, 3.3).
#pragma once

#include "hpa/types.h"

namespace hpa {

struct ColumnScores {
  float* squared_update;    // [in]  sum over rows of (w_new - w_old)^2
  float* inner_product;     // []    <w_new - w_old, w_old>_F
  float* old_squared_norm;  // []    ||w_old||_F^2
};

namespace cpu {

// w_old, w_new [out, in] of one dtype. Differences and products in float32, sums in a fixed order that does not
// depend on the number of threads. Both weights are read once.
Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result);

}  // namespace cpu
namespace cuda {

std::size_t column_scores_workspace_bytes(std::int64_t rows, std::int64_t columns);
Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace hpa
