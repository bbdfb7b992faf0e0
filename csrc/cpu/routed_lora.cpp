#include "hpa/routed_lora.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

// One task of the first product: its tokens stay in the second-level cache while its rows of A pass by. With the few
// tokens of decoding, tasks of fewer rows give every thread some.
constexpr std::int64_t kTokensPerTask = 64, kRowsPerTask = 24, kDecodingTokens = 16, kRowsPerDecodingTask = 6;
// One task of the second product: its panels of B stay in the first-level cache while the tokens pass by in chunks.
constexpr std::int64_t kPanelBytes = 40 << 10, kMostPanels = 4, kTokensPerChunk = 32;

std::int64_t panels_per_task(std::int64_t rows) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(rows, 1) * kPanel * static_cast<std::int64_t>(sizeof(float));
  return std::clamp<std::int64_t>(kPanelBytes / panel_bytes, 1, kMostPanels);
}

const char* advance(const void* p, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * static_cast<std::int64_t>(size_of(dtype));
}

// What of the linears side by side is one linear's.
struct Part {
  std::int64_t first_row;     // of its rows of A, which are columns of the intermediate
  std::int64_t first_shrink;  // of its tasks of the first product, for one block of tokens
  std::int64_t first_expand;  // of its tasks of the second product
};

// The linear that `task` belongs to: the last one whose first task, parts[l].*first, is not beyond it.
std::int64_t owner(const Part* parts, std::int64_t count, std::int64_t Part::* first, std::int64_t task) {
  std::int64_t l = count - 1;
  while (parts[l].*first > task) --l;
  return l;
}

std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

}  // namespace

// With A and B concatenated over tasks, and A over linears: mid = x A^T scaled by routing weight and scaling, and
// out = mid B^T for each linear.
Status routed_lora(const RoutedLoraArguments& arguments) {
  const RoutedLoraArguments& g = arguments;
  HPA_RETURN_UNLESS_OK(check_routed_lora(g));
  const std::int64_t tokens = g.batch * g.tokens;
  if (tokens == 0 || g.count == 0) return {};

  const std::int64_t rows_per_task = tokens <= kDecodingTokens ? kRowsPerDecodingTask : kRowsPerTask;
  Buffer<Part> parts(g.count);
  if (!parts) return kOutOfMemory;
  Part end{};
  std::int64_t panel_floats = 0;
  for (std::int64_t l = 0; l < g.count; ++l) {
    const RoutedLoraLinear& linear = g.linears[l];
    const std::int64_t rows = g.tasks * linear.rank;
    parts[l] = end;
    panel_floats = std::max(panel_floats, panels_per_task(rows) * kPanel * rows);
    end.first_row += rows;
    end.first_shrink += ceil_div(rows, rows_per_task);
    end.first_expand += ceil_div(linear.out, kPanel * panels_per_task(rows));
  }
  const std::int64_t stride = end.first_row, slots = slot_count();
  Buffer<float> mid(tokens * stride);
  Buffer<float> panels(slots * panel_floats);  // of B, for each thread
  if (!mid || !panels) return kOutOfMemory;
  const Kernels& loops = kernels();
  const int dtype = static_cast<int>(g.dtype);

  parallel_for(end.first_shrink * ceil_div(tokens, kTokensPerTask), [&](std::int64_t task) {
    const std::int64_t own = task % end.first_shrink;
    const std::int64_t l = owner(parts.data(), g.count, &Part::first_shrink, own);
    const RoutedLoraLinear& linear = g.linears[l];
    const std::int64_t first_token = task / end.first_shrink * kTokensPerTask;
    const std::int64_t first_row = (own - parts[l].first_shrink) * rows_per_task;
    const std::int64_t token_count = std::min(kTokensPerTask, tokens - first_token);
    const std::int64_t row_count = std::min(rows_per_task, g.tasks * linear.rank - first_row);
    float* block = mid.data() + first_token * stride + parts[l].first_row + first_row;
    loops.inner_products[dtype](advance(g.x, first_token * g.in, g.dtype), token_count,
                                advance(linear.a, first_row * g.in, g.dtype), row_count, g.in, block, stride);
    for (std::int64_t t = 0; t < token_count; ++t) {
      const float* weights = g.weights + (first_token + t) / g.tokens * g.tasks;
      for (std::int64_t r = 0; r < row_count; ++r) {
        const std::int64_t expert = (first_row + r) / linear.rank;
        block[t * stride + r] *= weights[expert] * linear.scaling[expert];
      }
    }
  });

  parallel_for(end.first_expand, slots, [&](std::int64_t task, std::int64_t slot) {
    const std::int64_t l = owner(parts.data(), g.count, &Part::first_expand, task);
    const RoutedLoraLinear& linear = g.linears[l];
    const std::int64_t rows = g.tasks * linear.rank;
    const std::int64_t width = kPanel * panels_per_task(rows), first = (task - parts[l].first_expand) * width;
    const std::int64_t end_column = std::min(linear.out, first + width);
    float* packed = panels.data() + slot * panel_floats;
    for (std::int64_t column = first; column < end_column; column += kPanel) {
      float* panel = packed + (column - first) * rows;
      for (std::int64_t expert = 0; expert < g.tasks; ++expert) {
        loops.pack_transposed[dtype](advance(linear.b, (expert * linear.out + column) * linear.rank, g.dtype),
                                     std::min(kPanel, end_column - column), linear.rank,
                                     panel + expert * linear.rank * kPanel);
      }
    }
    for (std::int64_t token = 0; token < tokens; token += kTokensPerChunk) {
      for (std::int64_t column = first; column < end_column; column += kPanel) {
        const std::int64_t offset = token * linear.out + column;
        loops.expand[dtype](mid.data() + token * stride + parts[l].first_row, std::min(kTokensPerChunk, tokens - token),
                            stride, rows, packed + (column - first) * rows,
                            linear.onto == nullptr ? nullptr : advance(linear.onto, offset, g.dtype),
                            const_cast<char*>(advance(linear.output, offset, g.dtype)), linear.out,
                            std::min(kPanel, end_column - column));
      }
    }
  });
  return {};
}

}  // namespace hpa::cpu
