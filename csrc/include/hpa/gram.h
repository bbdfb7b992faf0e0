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

// Which kernel is asked for. wgmma takes 16-bit x whose rows begin on 16-byte boundaries and any float32 x, which it
// splits into three bfloat16 (24 bits, six of the nine products), on devices of compute capability 9.0; mma_sync takes
// everything else. A float32 that is not finite makes its row and column of gram non-finite by either kernel, by wgmma
// always NaN.
enum class GramKernel : std::int32_t { mma_sync = 0, wgmma = 1 };

// Some tokens: x [tokens, in], and a mask as on the CPU.
struct GramSample {
  ConstMatrix x;
  const std::uint8_t* token_mask;
};

// As on the CPU, on `stream`. `workspace` holds at least gram_workspace_bytes(x, kernel) bytes of device memory,
// whatever the alignment of x: for float32 by wgmma up to 64 MB, or 12288 bytes a column where that is more, and the
// partial tiles, however many the tokens. Status `unavailable` where wgmma is asked for and the device or the build has
// none.
std::size_t gram_workspace_bytes(ConstMatrix x, GramKernel kernel = GramKernel::mma_sync);
Status gram_accumulate(ConstMatrix x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride,
                       void* workspace, Stream stream, GramKernel kernel = GramKernel::mma_sync);

// The same for several samples of one dtype and width, as if they were one after the other. wgmma adds up to 24 of
// them in one launch, and so reads and writes gram once (for float32: one launch a chunk of tokens, gram every 1024);
// mma_sync takes them one by one.
std::size_t gram_list_workspace_bytes(const GramSample* samples, std::int64_t count,
                                      GramKernel kernel = GramKernel::mma_sync);
Status gram_accumulate_list(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                            void* workspace, Stream stream, GramKernel kernel = GramKernel::mma_sync);

// What serves these samples where `wanted` is asked for, as far as they themselves decide it.
GramKernel gram_kernel_of(const GramSample* samples, std::int64_t count, GramKernel wanted);

}  // namespace cuda
}  // namespace hpa
