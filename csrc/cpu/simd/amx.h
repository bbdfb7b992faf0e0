// The tile instructions of AMX-BF16 (Intel SDM volume 1, chapter 18), each in a function of its own.
// csrc/tests/cpu/amx_model.h holds the twins in plain C++ that the tests use where no processor has them.
//
// Inline assembly, because GCC's intrinsics name only the first eight bytes of the configuration as an operand, and the
// compiler then drops the stores of the rest. Tile registers are allocated here alone: compilers do not use them.
#pragma once

#include <cstdint>

#include "cpu/simd/vector.h"

namespace hpa::cpu {

// Operand of ldtilecfg.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};  // of tile registers 0 to 7; the others must be zero
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64);

}  // namespace hpa::cpu

#if defined(HPA_AMX_MODEL)
#include "amx_model.h"
#else

namespace hpa::cpu::HPA_ISA {
namespace {

HPA_INLINE void tile_configure(const TileConfiguration& configuration) {
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}
HPA_INLINE void tile_release() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
HPA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Rows `stride` bytes apart.
template <int kTile>
HPA_INLINE void tile_load(const void* first_row, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(first_row), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
HPA_INLINE void tile_store(void* first_row, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(first_row), "r"(stride), "i"(kTile) : "memory");
}

// kSum[m][n] += sum over k of kLeft[m][k].low * kRight[k][n].low + kLeft[m][k].high * kRight[k][n].high
template <int kSum, int kLeft, int kRight>
HPA_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA

#endif
