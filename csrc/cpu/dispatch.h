// Which instruction set's inner loops are in use.
#pragma once

#include "cpu/simd/kernels.h"

namespace hpa::cpu {

// Chosen once, by CPUID, at the first call; set_instruction_set() changes it.
const Kernels& kernels();

}  // namespace hpa::cpu
