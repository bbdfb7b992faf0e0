// Between gram.cu, which chooses, and gram_sm90.cu, which computes.
#pragma once

#include <cstdint>

#include "hpa/gram.h"

namespace hpa::cuda {

// So many fit, with their tensor maps, into the 4 KB of a launch's parameters.
constexpr std::int64_t kSamplesPerLaunch = 24;

// Whether the current device and this build have the kernel.
Status wgmma_available();

// Whether the samples, none of them empty, are of one dtype and, if not float32, which is copied, can be described to
// the tensor memory accelerator.
bool wgmma_takes(const GramSample* samples, std::int64_t count);

// Of one group: up to kSamplesPerLaunch samples that wgmma_takes, of one dtype and width.
std::size_t wgmma_workspace_bytes(const GramSample* samples, std::int64_t count);
Status wgmma_accumulate(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                        void* workspace, Stream stream);

}  // namespace hpa::cuda
