// gram: G += sum over tokens of x^T x, the second moment of a linear layer's input.
// Source: the Hessian H = (2/n) sum x^T x of HPA (CVPR 2026) section 3; the factor 2/n is applied by the caller.
#pragma once

#include "hpa/types.h"

namespace hpa {
namespace cpu {

// x [tokens, in] float32, float16 or bfloat16; token_mask [tokens] bytes or null: a token counts where non-zero,
// and an excluded token's values are never used, so NaN in padding does no harm.
// gram [in, in] float32, rows gram_stride elements apart, both triangles updated; accumulation in float32.
Status gram_accumulate(ConstMatrix x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride);

}  // namespace cpu
namespace cuda {

// As on the CPU, on `stream`. `workspace` holds at least gram_workspace_bytes(x) bytes of device memory.
std::size_t gram_workspace_bytes(ConstMatrix x);
Status gram_accumulate(ConstMatrix x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride,
                       void* workspace, Stream stream);

}  // namespace cuda
}  // namespace hpa
