// What the processor executes and the operating system saves.
#pragma once

namespace hpa::cpu {

struct ProcessorFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // AVX-512 F, BW, VL and DQ, and the above
  bool avx512_bf16 = false;  // and vdpbf16ps
};

ProcessorFeatures detect_processor();

}  // namespace hpa::cpu
