// The adjoint of routed_lora: the gradients of one or several linears that share their input x. CPU only.
#pragma once

#include "hpa/types.h"

namespace hpa {

// With G the gradient of the linear's output, and gate[s, c] = weights[s, c] * scaling[c]:
struct RoutedLoraGradients {
  const void* a;             // [tasks, rank, in] contiguous
  const void* b_transposed;  // [tasks, rank, out] contiguous
  const float* scaling;      // [tasks]
  const void* output;        // G, [batch, tokens, out] contiguous
  std::int64_t out, rank;
  // Written; each null where it is not wanted.
  float* a_gradient;             // [tasks, rank, in]: (gate * G B)^T x
  float* b_transposed_gradient;  // [tasks, rank, out]: (gate * x A^T)^T G
  float* gate_gradient;          // [batch, tasks]: sum over tokens and rank of (G B) * (x A^T)
};

struct RoutedLoraBackwardArguments {
  const void* x;         // [batch, tokens, in] contiguous
  const float* weights;  // [batch, tasks] contiguous
  void* x_gradient;      // [batch, tokens, in] contiguous: sum over linears of (gate * G B) A; null if not wanted
  DType dtype;           // of x, x_gradient, a, b_transposed and output
  std::int64_t batch, tokens, in, tasks;
  const RoutedLoraGradients* linears;  // in host memory
  std::int64_t count;
};

namespace cpu {
// Everything accumulates in float32 (gate_gradient in float64); x_gradient is rounded once, after the sum over linears.
// Scratch: up to 16 bytes for each token and column of the linears' intermediates together.
Status routed_lora_backward(const RoutedLoraBackwardArguments& arguments);
}  // namespace cpu

}  // namespace hpa
