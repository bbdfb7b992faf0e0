// What the processor executes and the operating system saves.
#pragma once

namespace hpa::cpu {

struct ProcessorFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // AVX-512 F, BW, VL and DQ, and the above
  bool avx512_bf16 = false;  // and vdpbf16ps
  bool amx_bf16 = false;     // tiles and tdpbf16ps; a process must ask for their registers before it uses them
};

ProcessorFeatures detect_processor();

// Asks the operating system for the tile registers, for all threads of the process; false where it refuses. It refuses
// a process one of whose threads has too small a stack for signals, so the earlier it is asked the better.
bool request_tile_registers();

}  // namespace hpa::cpu
