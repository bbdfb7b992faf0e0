// routed_lora: sum over tasks c of weights[b, c] * scaling[c] * B_c A_c x, the routed top layer of HiDe (ACL 2025), of
// one linear or of several that share their input x, such as q/k/v or gate/up.
#pragma once

#include "hpa/types.h"

namespace hpa {

struct RoutedLoraLinear {
  const void* a;         // [tasks, rank, in] contiguous
  const void* b;         // [tasks, out, rank] contiguous
  const float* scaling;  // [tasks]
  const void* onto;      // [batch, tokens, out] contiguous, what the rounded sum is added to; null for nothing
  void* output;          // [batch, tokens, out] contiguous; may be `onto`
  std::int64_t out, rank;
};

struct RoutedLoraArguments {
  const void* x;         // [batch, tokens, in] contiguous
  const float* weights;  // [batch, tasks] contiguous
  DType dtype;           // of x, a, b, onto and output
  std::int64_t batch, tokens, in, tasks;
  const RoutedLoraLinear* linears;  // in host memory; read before the call returns
  std::int64_t count;
};

// Both products accumulate in float32; the intermediate [batch * tokens, tasks * rank] of each linear stays float32.
// Each linear's result is, bit for bit, what a call with that linear alone gives.
namespace cpu {
Status routed_lora(const RoutedLoraArguments& arguments);
}
namespace cuda {
// workspace: float32 [batch * tokens, sum over up to 8 linears of tasks * rank] in device memory. Two launches for
// every 8 linears.
std::size_t routed_lora_workspace_bytes(const RoutedLoraArguments& arguments);
Status routed_lora(const RoutedLoraArguments& arguments, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace hpa
