// The first product of routed_lora for bfloat16 with vdpbf16ps: two elements of x and A per lane and instruction.
//
// vdpbf16ps rounds to nearest even, and treats denormal inputs and results as zero whatever MXCSR says: products below
// 1.2e-38 vanish.
#include "cpu/simd/convert.h"
#include "cpu/simd/inner_products.h"

namespace hpa::cpu::HPA_ISA {
namespace {

struct Pairs {
  using Element = BFloat16;
  using Operand = I32;
  static constexpr int kStep = 2 * kLanes;
  HPA_INLINE static I32 read(const BFloat16* p) { return load_vector<I32>(p); }
  HPA_INLINE static I32 read(const BFloat16* p, std::int64_t count) {
    BFloat16 elements[kStep] = {};
    __builtin_memcpy(elements, p, static_cast<std::size_t>(count) * sizeof(BFloat16));
    return load_vector<I32>(elements);
  }
  HPA_INLINE static F32 add_product(I32 x, I32 a, F32 sum) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)a);
  }
};

}  // namespace

void fill_routed_lora_pairs(Kernels& kernels) { kernels.inner_products[2] = inner_products<Pairs>; }

}  // namespace hpa::cpu::HPA_ISA
