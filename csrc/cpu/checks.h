// What the CPU operations answer beyond the common argument checks.
#pragma once

#include "argument_checks.h"

namespace hpa::cpu {

constexpr Status kOutOfMemory = Status::unavailable("not enough memory for the operation's scratch buffers");

}  // namespace hpa::cpu
