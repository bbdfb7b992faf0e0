// The panel product of gram for bfloat16 with vdpbf16ps: two tokens per lane and instruction.
//
// vdpbf16ps adds the two products one after the other, rounding to nearest even, and treats denormal inputs and
// results as zero whatever MXCSR says: products below 1.2e-38 vanish, which no Gram can notice.
#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"

namespace hpa::cpu::HPA_ISA {
namespace {

HPA_INLINE F32 multiply_add_pairs(F32 sum, I32 a, I32 b) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

void add_pair_product(std::int64_t depth, const std::uint32_t* a, const std::uint32_t* b, float* c,
                      std::int64_t c_stride) {
  static_assert(kTileVectors * kLanes == kPanel);
  for (std::int64_t i = 0; i < kPanel; i += kTileRows) {
    F32 sum[kTileRows][kTileVectors] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
      I32 right[kTileVectors];
      HPA_UNROLL
      for (int v = 0; v < kTileVectors; ++v) right[v] = load_vector<I32>(b + k * kPanel + v * kLanes);
      HPA_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        const I32 left = I32{} + static_cast<std::int32_t>(a[k * kPanel + i + row]);
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) sum[row][v] = multiply_add_pairs(sum[row][v], left, right[v]);
      }
    }
    HPA_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      HPA_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        float* out = c + (i + row) * c_stride + v * kLanes;
        store_vector(out, load_vector<F32>(out) + sum[row][v]);
      }
    }
  }
}

}  // namespace

void fill_gram_pairs(Kernels& kernels) { kernels.add_pair_product = add_pair_product; }

}  // namespace hpa::cpu::HPA_ISA
