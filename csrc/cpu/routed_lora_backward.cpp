#include "hpa/routed_lora_backward.h"

#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

constexpr std::int64_t kTokensPerTask = 64, kRowsPerTask = 24;
// Tokens of a panel product at a time: the packed panel stays in the second-level cache, the sums in registers.
constexpr std::int64_t kDepth = 256;
constexpr std::int64_t kTokensPerChunk = 32;

const char* advance(const void* p, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * static_cast<std::int64_t>(size_of(dtype));
}

std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

Status check(const RoutedLoraBackwardArguments& r) {
  HPA_REQUIRE(is_known(r.dtype), "dtype: must be float32, float16 or bfloat16");
  HPA_REQUIRE(r.batch >= 0 && r.tokens >= 0, "tokens: must not be negative");
  HPA_REQUIRE(r.in >= 0, "in: must not be negative");
  HPA_REQUIRE(r.tasks >= 0, "tasks: must not be negative");
  HPA_REQUIRE(r.count >= 0, "count: must not be negative");
  HPA_REQUIRE(r.linears != nullptr || r.count == 0, "linears: must not be null");
  const bool any = r.batch * r.tokens * r.tasks != 0;
  HPA_REQUIRE(!any || r.x != nullptr || r.in == 0, "x: must not be null");
  HPA_REQUIRE(!any || r.weights != nullptr, "weights: must not be null");
  for (std::int64_t l = 0; l < r.count; ++l) {
    const RoutedLoraGradients& linear = r.linears[l];
    HPA_REQUIRE(linear.out >= 0, "out: must not be negative");
    HPA_REQUIRE(linear.rank >= 1 || r.tasks == 0, "rank: must be at least 1");
    if (!any) continue;
    HPA_REQUIRE(linear.a != nullptr || r.in == 0, "a: must not be null");
    HPA_REQUIRE(linear.b_transposed != nullptr || linear.out == 0, "b_transposed: must not be null");
    HPA_REQUIRE(linear.scaling != nullptr, "scaling: must not be null");
    HPA_REQUIRE(linear.output != nullptr || linear.out == 0, "output: must not be null");
  }
  return {};
}

// One call. Intermediates [tokens, rows] are those of all linears side by side; a linear's begin at first_row(l).
class Backward {
 public:
  explicit Backward(const RoutedLoraBackwardArguments& arguments)
      : g(arguments), tokens(g.batch * g.tokens), dtype(static_cast<int>(g.dtype)), loops(kernels()) {
    for (std::int64_t l = 0; l < g.count; ++l) {
      rows += rows_of(l);
      blocks += ceil_div(rows_of(l), kPanel);
    }
  }

  Status run() {
    bool shrunk_wanted = false, output_wanted = g.x_gradient != nullptr, gates = false, to_a = false, to_b = false;
    for (std::int64_t l = 0; l < g.count; ++l) {
      const RoutedLoraGradients& linear = g.linears[l];
      gates = gates || linear.gate_gradient != nullptr;
      to_a = to_a || linear.a_gradient != nullptr;
      to_b = to_b || linear.b_transposed_gradient != nullptr;
    }
    output_wanted = output_wanted || gates || to_a;
    shrunk_wanted = gates || to_b;
    Buffer<float> of_output(output_wanted ? tokens * rows : 0), shrunk(shrunk_wanted ? tokens * rows : 0);
    Buffer<std::int64_t> all_tokens(std::max(tokens, rows));
    Buffer<float> panels(slots * kPanel * std::max(kDepth, rows)), sums(slots * blocks * kPanel * kPanel);
    Buffer<float> left((to_a || to_b) ? blocks * kPanel * tokens : 0);
    if (!of_output || !shrunk || !all_tokens || !panels || !sums || !left) return kOutOfMemory;
    for (std::int64_t i = 0; i < std::max(tokens, rows); ++i) all_tokens[i] = i;
    indices_ = all_tokens.data(), panels_ = panels.data(), sums_ = sums.data();

    if (output_wanted) {
      multiply(of_output.data(), [this](std::int64_t l) {
        return Operands{g.linears[l].output, g.linears[l].b_transposed, g.linears[l].out};
      });
    }
    if (shrunk_wanted) {
      multiply(shrunk.data(), [this](std::int64_t l) { return Operands{g.x, g.linears[l].a, g.in}; });
    }
    if (gates) sum_gates(of_output.data(), shrunk.data());
    if (output_wanted) apply_gates(of_output.data());
    if (to_b) apply_gates(shrunk.data());
    if (g.x_gradient != nullptr) expand(of_output.data());
    if (to_a) {
      pack_left(of_output.data(), left.data());
      outer(left.data(), 0, g.count, g.x, g.in, [this](std::int64_t l) { return g.linears[l].a_gradient; });
    }
    if (to_b) {
      pack_left(shrunk.data(), left.data());
      for (std::int64_t l = 0; l < g.count; ++l) {
        outer(left.data(), l, l + 1, g.linears[l].output, g.linears[l].out,
              [this](std::int64_t own) { return g.linears[own].b_transposed_gradient; });
      }
    }
    return {};
  }

 private:
  struct Operands {
    const void* tokens;  // [tokens, depth]
    const void* rows;    // [rows of the linear, depth]
    std::int64_t depth;
  };

  std::int64_t rows_of(std::int64_t l) const { return g.tasks * g.linears[l].rank; }

  // out[t, first_row(l) + r] = <tokens[t], rows[r]>
  template <typename OperandsOf>
  void multiply(float* out, OperandsOf operands_of) {
    std::int64_t first_row = 0;
    for (std::int64_t l = 0; l < g.count; ++l) {
      const Operands of = operands_of(l);
      const std::int64_t count = rows_of(l), row_tasks = ceil_div(count, kRowsPerTask);
      parallel_for(row_tasks * ceil_div(tokens, kTokensPerTask), [&](std::int64_t task) {
        const std::int64_t token = task / row_tasks * kTokensPerTask, row = task % row_tasks * kRowsPerTask;
        loops.inner_products[dtype](advance(of.tokens, token * of.depth, g.dtype),
                                    std::min(kTokensPerTask, tokens - token), advance(of.rows, row * of.depth, g.dtype),
                                    std::min(kRowsPerTask, count - row), of.depth, out + token * rows + first_row + row,
                                    rows);
      });
      first_row += count;
    }
  }

  void sum_gates(const float* of_output, const float* shrunk) {
    std::int64_t first_row = 0;
    for (std::int64_t l = 0; l < g.count; ++l) {
      const RoutedLoraGradients& linear = g.linears[l];
      if (linear.gate_gradient != nullptr) {
        parallel_for(g.batch * g.tasks, [&](std::int64_t task) {
          const std::int64_t sample = task / g.tasks, expert = task % g.tasks;
          double sum = 0;
          for (std::int64_t t = sample * g.tokens; t < (sample + 1) * g.tokens; ++t) {
            const std::int64_t first = t * rows + first_row + expert * linear.rank;
            for (std::int64_t r = first; r < first + linear.rank; ++r) sum += double{of_output[r]} * shrunk[r];
          }
          linear.gate_gradient[task] = static_cast<float>(sum);
        });
      }
      first_row += rows_of(l);
    }
  }

  void apply_gates(float* values) {
    parallel_for(tokens, [&](std::int64_t t) {
      const float* weights = g.weights + t / g.tokens * g.tasks;
      float* value = values + t * rows;
      for (std::int64_t l = 0; l < g.count; ++l) {
        const RoutedLoraGradients& linear = g.linears[l];
        for (std::int64_t expert = 0; expert < g.tasks; ++expert) {
          const float gate = weights[expert] * linear.scaling[expert];
          for (std::int64_t r = 0; r < linear.rank; ++r) *value++ *= gate;
        }
      }
    });
  }

  // x_gradient = values [tokens, rows] times the A of all linears, [rows, in].
  void expand(const float* values) {
    parallel_for(ceil_div(g.in, kPanel), slots, [&](std::int64_t task, std::int64_t slot) {
      const std::int64_t column = task * kPanel, columns = std::min(kPanel, g.in - column);
      float* panel = panels_ + slot * kPanel * std::max(kDepth, rows);
      float* part = panel;
      for (std::int64_t l = 0; l < g.count; ++l) {
        loops.pack_tokens[dtype](g.linears[l].a, g.in, indices_, rows_of(l), column, columns, part, 0);
        part += rows_of(l) * kPanel;
      }
      loops.expand[dtype](values, tokens, rows, rows, panel, nullptr,
                          const_cast<char*>(advance(g.x_gradient, column, g.dtype)), g.in, columns);
    });
  }

  // Panels [tokens][kPanel] of the columns of values [tokens, rows], each linear's beginning with a panel of its own.
  void pack_left(const float* values, float* left) {
    parallel_for(ceil_div(tokens, kTokensPerChunk), [&](std::int64_t task) {
      const std::int64_t token = task * kTokensPerChunk, count = std::min(kTokensPerChunk, tokens - token);
      std::int64_t first_row = 0, block = 0;
      for (std::int64_t l = 0; l < g.count; ++l) {
        loops.pack_tokens[0](values, rows, indices_ + token, count, first_row, rows_of(l),
                             left + (block * tokens + token) * kPanel, tokens * kPanel);
        first_row += rows_of(l);
        block += ceil_div(rows_of(l), kPanel);
      }
    });
  }

  // gradient_of(l) [rows of l, columns] = values^T right, for the linears [first, last) whose gradient is wanted.
  template <typename GradientOf>
  void outer(const float* left, std::int64_t first, std::int64_t last, const void* right, std::int64_t columns,
             GradientOf gradient_of) {
    bool wanted = false;
    for (std::int64_t l = first; l < last; ++l) wanted = wanted || gradient_of(l) != nullptr;
    if (!wanted) return;
    parallel_for(ceil_div(columns, kPanel), slots, [&](std::int64_t task, std::int64_t slot) {
      const std::int64_t column = task * kPanel, own_columns = std::min(kPanel, columns - column);
      float* panel = panels_ + slot * kPanel * std::max(kDepth, rows);
      float* sums = sums_ + slot * blocks * kPanel * kPanel;
      std::memset(sums, 0, static_cast<std::size_t>(blocks * kPanel * kPanel) * sizeof(float));
      for (std::int64_t token = 0; token < tokens; token += kDepth) {
        const std::int64_t depth = std::min(kDepth, tokens - token);
        loops.pack_tokens[dtype](right, columns, indices_ + token, depth, column, own_columns, panel, 0);
        for_blocks(first, last, gradient_of, [&](std::int64_t block, std::int64_t, std::int64_t) {
          loops.add_product(depth, left + (block * tokens + token) * kPanel, panel, sums + block * kPanel * kPanel,
                            kPanel);
        });
      }
      for_blocks(first, last, gradient_of, [&](std::int64_t block, std::int64_t l, std::int64_t row) {
        for (std::int64_t r = 0; r < std::min(kPanel, rows_of(l) - row); ++r) {
          std::memcpy(gradient_of(l) + (row + r) * columns + column, sums + (block * kPanel + r) * kPanel,
                      static_cast<std::size_t>(own_columns) * sizeof(float));
        }
      });
    });
  }

  // body(block, linear, first row of the block in the linear) for the blocks of those linears in [first, last).
  template <typename GradientOf, typename Body>
  void for_blocks(std::int64_t first, std::int64_t last, GradientOf gradient_of, Body body) const {
    std::int64_t block = 0;
    for (std::int64_t l = 0; l < last; ++l) {
      for (std::int64_t row = 0; row < rows_of(l); row += kPanel, ++block) {
        if (l >= first && gradient_of(l) != nullptr) body(block, l, row);
      }
    }
  }

  const RoutedLoraBackwardArguments& g;
  const std::int64_t tokens;
  const int dtype;
  const Kernels& loops;
  // Read once: another thread of the caller's may set another count while this runs, and scratch is indexed by slots.
  const std::int64_t slots = slot_count();
  std::int64_t rows = 0, blocks = 0;
  const std::int64_t* indices_ = nullptr;
  float* panels_ = nullptr;
  float* sums_ = nullptr;
};

}  // namespace

Status routed_lora_backward(const RoutedLoraBackwardArguments& arguments) {
  HPA_RETURN_UNLESS_OK(check(arguments));
  return Backward(arguments).run();
}

}  // namespace hpa::cpu
