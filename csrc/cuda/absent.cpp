// Stands in for every CUDA kernel in a build without nvcc: each operation answers that it is not there.
#include "hpa/hpa.h"

namespace hpa::cuda {
namespace {
constexpr Status kAbsent = Status::unavailable("hpa_ext was built without CUDA kernels: no nvcc was found");
}

std::int32_t device_count() { return 0; }
const char* error_text(std::int32_t) { return "built without CUDA"; }

std::size_t gram_workspace_bytes(ConstMatrix, GramKernel) { return 0; }
Status gram_accumulate(ConstMatrix, const std::uint8_t*, float*, std::int64_t, void*, Stream, GramKernel) {
  return kAbsent;
}
std::size_t gram_list_workspace_bytes(const GramSample*, std::int64_t, GramKernel) { return 0; }
Status gram_accumulate_list(const GramSample*, std::int64_t, float*, std::int64_t, void*, Stream, GramKernel) {
  return kAbsent;
}
GramKernel gram_kernel_of(const GramSample*, std::int64_t, GramKernel) { return GramKernel::mma_sync; }

std::size_t inverse_diagonal_workspace_bytes(std::int64_t, std::int64_t, Precision) { return 0; }
Status inverse_diagonal(MatrixBatch, double, Precision, InverseDiagonalResult, void*, Stream) { return kAbsent; }

std::size_t column_scores_workspace_bytes(std::int64_t, std::int64_t) { return 0; }
Status column_scores(ConstMatrix, ConstMatrix, ColumnScores, void*, Stream) { return kAbsent; }
std::size_t column_scores_list_workspace_bytes(const ColumnScoresItem*, std::int64_t) { return 0; }
Status column_scores_list(const ColumnScoresItem*, std::int64_t, void*, Stream) { return kAbsent; }

Status column_mask(ColumnMaskArguments, Stream) { return kAbsent; }
Status column_mask_list(const ColumnMaskItem*, std::int64_t, Stream) { return kAbsent; }

Status project_merge(ConstMatrix, ConstMatrix, const std::uint8_t*, MaskAxis, const float*, Matrix, Stream) {
  return kAbsent;
}
Status project_merge_list(const ProjectMergeItem*, std::int64_t, Stream) { return kAbsent; }

std::size_t routed_lora_workspace_bytes(const RoutedLoraArguments&) { return 0; }
Status routed_lora(const RoutedLoraArguments&, void*, Stream) { return kAbsent; }

std::size_t low_rank_scores_workspace_bytes(std::int64_t, std::int64_t) { return 0; }
Status low_rank_scores(ConstMatrix, LowRankUpdate, ColumnScores, void*, Stream) { return kAbsent; }
Status low_rank_merge(ConstMatrix, LowRankUpdate, const std::uint8_t*, MaskAxis, const float*, Matrix, Stream) {
  return kAbsent;
}
Status low_rank_add(ConstMatrix, LowRankUpdate, const float*, MaskAxis, Matrix, Stream) { return kAbsent; }

}  // namespace hpa::cuda
