#include "cpu/processor.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hpa::cpu {

#if defined(__x86_64__)
namespace {

struct Leaf {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned int leaf, unsigned int subleaf) {
  Leaf result;
  if (!__get_cpuid_count(leaf, subleaf, &result.eax, &result.ebx, &result.ecx, &result.edx)) return {};
  return result;
}

// XCR0: the register state that the operating system saves when it switches threads. Inline, because the intrinsic
// would need this file to be compiled with -mxsave.
std::uint64_t extended_control_register() {
  std::uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr bool bit(std::uint64_t word, int position) { return ((word >> position) & 1) != 0; }

}  // namespace

// Bits: Intel SDM volume 2A, CPUID, leaves 1 and 7; volume 1, section 13.3 for XCR0.
ProcessorFeatures detect_processor() {
  ProcessorFeatures features;
  const Leaf basic = cpuid(1, 0), extended = cpuid(7, 0), extended_1 = cpuid(7, 1);
  const bool os_uses_xsave = bit(basic.ecx, 27);
  if (!os_uses_xsave) return features;
  const std::uint64_t state = extended_control_register();
  const bool saves_ymm = (state & 0x06) == 0x06;
  const bool saves_zmm = (state & 0xe6) == 0xe6;
  const bool fma = bit(basic.ecx, 12), avx = bit(basic.ecx, 28), f16c = bit(basic.ecx, 29);
  features.avx2 = saves_ymm && avx && fma && f16c && bit(extended.ebx, 5);
  const bool f = bit(extended.ebx, 16), dq = bit(extended.ebx, 17), bw = bit(extended.ebx, 30),
             vl = bit(extended.ebx, 31);
  features.avx512 = features.avx2 && saves_zmm && f && dq && bw && vl;
  features.avx512_bf16 = features.avx512 && bit(extended_1.eax, 5);
  const bool saves_tiles = bit(state, 17) && bit(state, 18);  // their configuration and their data
  features.amx_bf16 = features.avx512_bf16 && saves_tiles && bit(extended.edx, 22) && bit(extended.edx, 24);
  return features;
}

// arch_prctl(2), Documentation/arch/x86/xstate.rst of Linux: from 5.16 on, the tile data is given on request only.
bool request_tile_registers() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#else

ProcessorFeatures detect_processor() { return {}; }
bool request_tile_registers() { return false; }

#endif

}  // namespace hpa::cpu
