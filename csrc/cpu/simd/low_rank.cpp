// Inner loops of low_rank on panels of float32.
#include "cpu/simd/low_rank.h"

#include "cpu/simd/product.h"

namespace hpa::cpu::HPA_ISA {
namespace {

struct FloatProduct {
  using Element = float;
  HPA_INLINE static void tile(std::int64_t depth, const float* left, const float* right,
                              F32 (&sum)[kTileRows][kTileVectors]) {
    product_tile<float, kTileRows, kTileVectors>(depth, left, kPanel, 1, right, sum);
  }
};

}  // namespace

void fill_low_rank(Kernels& kernels) {
  fill<float, FloatProduct>(kernels.low_rank_scores[0], kernels.low_rank_merge[0]);
  fill<Float16, FloatProduct>(kernels.low_rank_scores[1], kernels.low_rank_merge[1]);
  fill<BFloat16, FloatProduct>(kernels.low_rank_scores[2], kernels.low_rank_merge[2]);
  for (int dtype = 0; dtype < 3; ++dtype) {
    kernels.low_rank_pair_scores[dtype] = nullptr;
    kernels.low_rank_pair_merge[dtype] = nullptr;
  }
}

}  // namespace hpa::cpu::HPA_ISA
