// What this build is and how it runs on this machine.
#pragma once

#include <cstdint>

#include "hpa/types.h"

namespace hpa {

struct BuildInfo {
  const char* version;  // of hpa_ext
  const char* compiler;
  const char* cuda_version;        // of the toolkit, "" for a build without CUDA
  const char* cuda_architectures;  // "80-real,90a-real,...", "" without CUDA
};

BuildInfo build_info();

namespace cpu {

// How many threads an operation may use, the calling one included; at least 1. Results do not depend on it.
void set_thread_count(std::int32_t threads);
std::int32_t thread_count();

// The instruction sets this build has kernels for and this processor runs, slowest first, as a
// comma-separated list ("portable,avx2,avx512,avx512_bf16,amx_bf16"), and the one in use. The fastest is chosen, but
// for amx_bf16, whose kernel of gram has not run on a processor that has AMX: it is used on request only.
const char* available_instruction_sets();
const char* instruction_set();

// Uses another of the available sets, for tests and measurements. Not meant to be called while operations run.
// Unavailable where the processor lacks it, or the operating system refuses the tile registers of amx_bf16.
Status set_instruction_set(const char* name);

}  // namespace cpu
namespace cuda {

// Number of devices the driver shows, 0 where there is no driver or the build has no CUDA.
std::int32_t device_count();

// The text of a Status::device_code.
const char* error_text(std::int32_t device_code);

}  // namespace cuda
}  // namespace hpa
