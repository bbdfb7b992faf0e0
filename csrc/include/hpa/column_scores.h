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

// One layer of a list. Layers of a list may differ in shape, dtype and strides.
struct ColumnScoresItem {
  ConstMatrix w_old;  // [out, in]
  ConstMatrix w_new;  // [out, in], of the dtype of w_old
  ColumnScores result;
};

namespace cpu {

// Differences and products in float32, sums in a fixed order that depends on a layer's own shape alone: neither the
// number of threads nor what else is in the list shows in the bits. Both weights are read once. Scratch memory for
// 32 MiB of partial sums at most, or for the largest layer's where those are more, however long the list is.
Status column_scores_list(const ColumnScoresItem* items, std::int64_t count);

// A list of one.
Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result);

}  // namespace cpu
namespace cuda {

// Two launches for up to 256 layers, whatever their shapes, dtypes and strides; the items themselves lie in host memory
// and travel as kernel parameters. `workspace`: column_scores_list_workspace_bytes(items, count) bytes of device
// memory, some 1 MB a layer, used again for every 256 layers.
std::size_t column_scores_list_workspace_bytes(const ColumnScoresItem* items, std::int64_t count);
Status column_scores_list(const ColumnScoresItem* items, std::int64_t count, void* workspace, Stream stream);

// A list of one.
std::size_t column_scores_workspace_bytes(std::int64_t rows, std::int64_t columns);
Status column_scores(ConstMatrix w_old, ConstMatrix w_new, ColumnScores result, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace hpa
