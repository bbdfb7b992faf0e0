#include "hpa/routed_lora.h"

#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

// One task of the first product: its tokens stay in the second-level cache while its rows of A pass by.
constexpr std::int64_t kTokensPerTask = 16, kRowsPerTask = 24;

const char* advance(const void* p, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * static_cast<std::int64_t>(size_of(dtype));
}

}  // namespace

// With A and B concatenated over tasks: mid = x A^T scaled by routing weight and scaling, and out = mid B^T.
Status routed_lora(RoutedLoraArguments arguments) {
  const RoutedLoraArguments& g = arguments;
  HPA_RETURN_UNLESS_OK(check_routed_lora(g));
  const std::int64_t tokens = g.batch * g.tokens, rows = g.tasks == 0 ? 0 : g.tasks * g.rank;
  if (tokens == 0 || g.out == 0) return {};

  const std::int64_t slots = slot_count();
  Buffer<float> mid(tokens * rows);             // [tokens, tasks * rank]
  Buffer<float> panels(slots * rows * kPanel);  // one panel of B per thread
  if (!mid || !panels) return kOutOfMemory;
  const Kernels& loops = kernels();
  const int dtype = static_cast<int>(g.dtype);

  const std::int64_t row_tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const std::int64_t token_tasks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(row_tasks * token_tasks, [&](std::int64_t task) {
    const std::int64_t first_token = task / row_tasks * kTokensPerTask, first_row = task % row_tasks * kRowsPerTask;
    const std::int64_t token_count = std::min(kTokensPerTask, tokens - first_token);
    const std::int64_t row_count = std::min(kRowsPerTask, rows - first_row);
    float* block = mid.data() + first_token * rows + first_row;
    loops.inner_products[dtype](advance(g.x, first_token * g.in, g.dtype), token_count,
                                advance(g.a, first_row * g.in, g.dtype), row_count, g.in, block, rows);
    for (std::int64_t t = 0; t < token_count; ++t) {
      const float* weights = g.weights + (first_token + t) / g.tokens * g.tasks;
      for (std::int64_t r = 0; r < row_count; ++r) {
        const std::int64_t expert = (first_row + r) / g.rank;
        block[t * rows + r] *= weights[expert] * g.scaling[expert];
      }
    }
  });

  parallel_for((g.out + kPanel - 1) / kPanel, slots, [&](std::int64_t task, std::int64_t slot) {
    const std::int64_t first = task * kPanel, columns = std::min(kPanel, g.out - first);
    float* panel = panels.data() + slot * rows * kPanel;
    for (std::int64_t expert = 0; expert < g.tasks; ++expert) {
      loops.pack_transposed[dtype](advance(g.b, (expert * g.out + first) * g.rank, g.dtype), columns, g.rank,
                                   panel + expert * g.rank * kPanel);
    }
    loops.expand[dtype](mid.data(), tokens, rows, panel, const_cast<char*>(advance(g.output, first, g.dtype)), g.out,
                        columns);
  });
  return {};
}

}  // namespace hpa::cpu
