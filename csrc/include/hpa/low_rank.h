// low_rank: HPA on a LoRA update D = scaling * B A of a weight, from B and A, without D or the new weight in memory.
//   low_rank_scores  what column_scores gives for D
//   low_rank_merge   M W + (1 - M)(W (1 - c) + D), what project_merge gives for W + D
//   low_rank_add     W diag(gain) + D, the same sum where the gain is stored: a harmonized adapter merges to the very
//                    bits of low_rank_merge
#pragma once

#include "hpa/column_scores.h"
#include "hpa/project_merge.h"
#include "hpa/types.h"

namespace hpa {

struct LowRankUpdate {
  ConstMatrix a;  // [rank, in]
  ConstMatrix b;  // [out, rank]; its dtype may differ from that of a, and both from that of the weight
  float scaling;
};

namespace cpu {

// Every D_ij is a sum over the rank, in order, in float32, fused where the processor does. It is the same in all three
// operations, whatever the layout, the threads, the weight's dtype, and whether A and B are stored as bfloat16 or as
// float32 of the same values. Only that where both are bfloat16 and the processor has vdpbf16ps, denormal elements of A
// and B count as zero, and so do sums below 1.2e-38.
Status low_rank_scores(ConstMatrix w_old, LowRankUpdate update, ColumnScores result);

// mask, axis, coefficient and out as for project_merge: out may be w_old itself (same pointer and row stride).
// w_old * (1 - c) + D is fused, hence rounded once to float32, and once more to the dtype of the weight.
Status low_rank_merge(ConstMatrix w_old, LowRankUpdate update, const std::uint8_t* mask, MaskAxis axis,
                      const float* coefficient, Matrix out);

// gain: float32 [in], or [out] with MaskAxis::output; null: 1.
Status low_rank_add(ConstMatrix w, LowRankUpdate update, const float* gain, MaskAxis axis, Matrix out);

}  // namespace cpu
namespace cuda {

// As above, on tensor cores where A and B are of one 16-bit dtype (then 16 of the rank are added at once, and D has
// other bits than from the same A and B in float32), in float32 arithmetic otherwise. coefficient and gain lie in
// device memory; workspace: device memory on a 16-byte boundary.
std::size_t low_rank_scores_workspace_bytes(std::int64_t rows, std::int64_t columns);
Status low_rank_scores(ConstMatrix w_old, LowRankUpdate update, ColumnScores result, void* workspace, Stream stream);
Status low_rank_merge(ConstMatrix w_old, LowRankUpdate update, const std::uint8_t* mask, MaskAxis axis,
                      const float* coefficient, Matrix out, Stream stream);
Status low_rank_add(ConstMatrix w, LowRankUpdate update, const float* gain, MaskAxis axis, Matrix out, Stream stream);

}  // namespace cuda
}  // namespace hpa
