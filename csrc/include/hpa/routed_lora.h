// routed_lora: sum over tasks c of weights[b, c] * scaling[c] * B_c A_c x, the routed top layer of HiDe (ACL 2025).
#pragma once

#include "hpa/types.h"

namespace hpa {

struct RoutedLoraArguments {
  const void* x;         // [batch, tokens, in] contiguous
  const void* a;         // [tasks, rank, in] contiguous
  const void* b;         // [tasks, out, rank] contiguous
  const float* weights;  // [batch, tasks] contiguous
  const float* scaling;  // [tasks]
  void* output;          // [batch, tokens, out] contiguous
  DType dtype;           // of x, a, b and output
  std::int64_t batch, tokens, in, out, tasks, rank;
};

// Both products accumulate in float32; the intermediate [batch * tokens, tasks * rank] stays float32.
namespace cpu {
Status routed_lora(RoutedLoraArguments arguments);
}
namespace cuda {
// workspace: float32 [batch * tokens, tasks * rank] in device memory.
std::size_t routed_lora_workspace_bytes(const RoutedLoraArguments& arguments);
Status routed_lora(RoutedLoraArguments arguments, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace hpa
