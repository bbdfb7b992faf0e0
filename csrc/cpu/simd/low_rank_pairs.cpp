// Inner loops of low_rank on pairs of bfloat16, with vdpbf16ps: two elements of the rank per lane and instruction.
// gram_pairs.cpp says how that instruction rounds and what it does to denormals.
#include "cpu/simd/low_rank.h"

namespace hpa::cpu::HPA_ISA {
namespace {

struct PairProduct {
  using Element = std::uint32_t;
  HPA_INLINE static void tile(std::int64_t depth, const std::uint32_t* left, const std::uint32_t* right,
                              F32 (&sum)[kTileRows][kTileVectors]) {
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      HPA_UNROLL
      for (int v = 0; v < kTileVectors; ++v) sum[row][v] = F32{};
    }
    for (std::int64_t k = 0; k < depth; ++k) {
      I32 columns[kTileVectors];
      HPA_UNROLL
      for (int v = 0; v < kTileVectors; ++v) columns[v] = load_vector<I32>(right + k * kPanel + v * kLanes);
      HPA_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        const I32 pair = I32{} + static_cast<std::int32_t>(left[k * kPanel + row]);
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
          sum[row][v] = (F32)_mm512_dpbf16_ps((__m512)sum[row][v], (__m512bh)pair, (__m512bh)columns[v]);
        }
      }
    }
  }
};

}  // namespace

void fill_low_rank_pairs(Kernels& kernels) {
  fill<float, PairProduct>(kernels.low_rank_pair_scores[0], kernels.low_rank_pair_merge[0]);
  fill<Float16, PairProduct>(kernels.low_rank_pair_scores[1], kernels.low_rank_pair_merge[1]);
  fill<BFloat16, PairProduct>(kernels.low_rank_pair_scores[2], kernels.low_rank_pair_merge[2]);
}

}  // namespace hpa::cpu::HPA_ISA
