#include <array>

#include "check.h"
#include "data.h"
#include "hpa/routed_lora_backward.h"
#include "hpa/runtime.h"

using namespace hpa;
using namespace hpa::test;

namespace {

constexpr float kUntouched = 12345.0f;

struct Linear {
  std::int64_t out, rank;
};

// Values with a guard of one element behind them.
struct Sums {
  explicit Sums(std::int64_t count) : values(static_cast<std::size_t>(count + 1), kUntouched) {}
  std::vector<float> values;
  bool intact() const { return values.back() == kUntouched; }
};

// What is wanted of each linear: A, B, gate; and of x.
struct Wanted {
  bool x, a, b, gate;
};

void compare(const std::vector<Linear>& shapes, std::int64_t batch, std::int64_t tokens, std::int64_t in,
             std::int64_t tasks, DType dtype, const Wanted& wanted, const std::string& set) {
  const std::string context =
      set + " " + name_of(dtype) + " tokens " + std::to_string(tokens) + " linears " + std::to_string(shapes.size());
  Random random(static_cast<unsigned>(in + 3 * tokens));
  const std::int64_t rows = batch * tokens;
  GuardedMatrix x(rows, in, dtype, 0), x_gradient(rows, in, dtype, 0), first_x = x_gradient;
  x.fill_normal(random);
  std::vector<float> weights(batch * tasks), scaling(tasks);
  for (auto& w : weights) w = static_cast<float>(random.normal());
  for (auto& w : scaling) w = static_cast<float>(random.normal());
  std::vector<GuardedMatrix> a, b, output;
  std::vector<std::array<Sums, 3>> sums;
  std::vector<RoutedLoraGradients> linears;
  for (const Linear& shape : shapes) {
    a.emplace_back(tasks * shape.rank, in, dtype, 0);
    b.emplace_back(tasks * shape.rank, shape.out, dtype, 0);
    output.emplace_back(rows, shape.out, dtype, 0);
    for (GuardedMatrix* m : {&a.back(), &b.back(), &output.back()}) m->fill_normal(random, 0.3);
    sums.push_back({Sums(tasks * shape.rank * in), Sums(tasks * shape.rank * shape.out), Sums(batch * tasks)});
  }
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    linears.push_back({a[l].view().data, b[l].view().data, scaling.data(), output[l].view().data, shapes[l].out,
                       shapes[l].rank, wanted.a ? sums[l][0].values.data() : nullptr,
                       wanted.b ? sums[l][1].values.data() : nullptr,
                       wanted.gate ? sums[l][2].values.data() : nullptr});
  }
  std::vector<std::array<Sums, 3>> first;
  for (const std::int32_t threads : {1, 2, 3}) {
    cpu::set_thread_count(threads);
    const Status status =
        cpu::routed_lora_backward({x.view().data, weights.data(), wanted.x ? x_gradient.mutable_view().data : nullptr,
                                   dtype, batch, tokens, in, tasks, linears.data(), std::ssize(linears)});
    CHECK(status.ok(), context + status.message);
    CHECK(x_gradient.guards_intact(), context);
    if (threads == 1) first = sums, first_x = x_gradient;
    CHECK(x_gradient == first_x, context + " thread count");
    for (std::size_t l = 0; l < shapes.size(); ++l) {
      for (std::size_t kind = 0; kind < 3; ++kind) {
        CHECK(sums[l][kind].intact(), context);
        CHECK(sums[l][kind].values == first[l][kind].values, context + " thread count");
      }
    }
  }
  // float64, every sum with the sum of magnitudes beside it.
  struct Exact {
    double sum = 0, size = 0;
    void add(double value, double magnitude) { sum += value, size += magnitude; }
  };
  const auto near = [&](double found, const Exact& exact, double unit) {
    return std::abs(found - exact.sum) <= 2e-6 * exact.size + 1.01 * unit * std::abs(exact.sum) + 1e-7;
  };
  std::vector<Exact> to_x(rows * in);
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    const std::int64_t rank = shapes[l].rank, hidden = tasks * rank, out = shapes[l].out;
    std::vector<Exact> of_output(rows * hidden), shrunk(rows * hidden), to_a(hidden * in), to_b(hidden * out),
        to_gate(batch * tasks);
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        Exact &g = of_output[t * hidden + h], &s = shrunk[t * hidden + h];
        for (std::int64_t o = 0; o < out; ++o) {
          g.add(output[l].at(t, o) * b[l].at(h, o), std::abs(output[l].at(t, o) * b[l].at(h, o)));
        }
        for (std::int64_t i = 0; i < in; ++i) s.add(x.at(t, i) * a[l].at(h, i), std::abs(x.at(t, i) * a[l].at(h, i)));
        const double gate = double(weights[t / tokens * tasks + h / rank]) * scaling[h / rank];
        to_gate[t / tokens * tasks + h / rank].add(g.sum * s.sum, g.size * s.size);
        for (std::int64_t i = 0; i < in; ++i) {
          to_x[t * in + i].add(gate * g.sum * a[l].at(h, i), std::abs(gate * a[l].at(h, i)) * g.size);
          to_a[h * in + i].add(gate * g.sum * x.at(t, i), std::abs(gate * x.at(t, i)) * g.size);
        }
        for (std::int64_t o = 0; o < out; ++o) {
          to_b[h * out + o].add(gate * s.sum * output[l].at(t, o), std::abs(gate * output[l].at(t, o)) * s.size);
        }
      }
    }
    const std::vector<Exact>* const exact[] = {&to_a, &to_b, &to_gate};
    const bool asked[] = {wanted.a, wanted.b, wanted.gate};
    for (std::size_t kind = 0; kind < 3; ++kind) {
      for (std::size_t i = 0; i < exact[kind]->size(); ++i) {
        const float found = sums[l][kind].values[i];
        CHECK(asked[kind] ? near(found, (*exact[kind])[i], 0) : found == kUntouched,
              context + " gradient " + std::to_string(kind) + " of linear " + std::to_string(l));
      }
    }
  }
  if (!wanted.x) return;
  const double unit = dtype == DType::float32 ? 0 : dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t i = 0; i < in; ++i) CHECK(near(x_gradient.at(t, i), to_x[t * in + i], unit), context + " x");
  }
}

void invalid() {
  float v[4] = {1, 1, 1, 1};
  const RoutedLoraGradients good = {v, v, v, v, 1, 1, v, v, v};
  const auto with = [&](auto change) {
    RoutedLoraGradients linears[] = {good, good};
    RoutedLoraBackwardArguments arguments = {v, v, v, DType::float32, 1, 1, 1, 1, linears, 2};
    change(arguments, linears[1]);
    return cpu::routed_lora_backward(arguments);
  };
  CHECK(with([](auto&, auto&) {}).ok(), "");
  CHECK(refused(with([](auto& g, auto&) { g.dtype = static_cast<DType>(7); }), "dtype"), "");
  CHECK(refused(with([](auto& g, auto&) { g.tokens = -1; }), "tokens"), "");
  CHECK(refused(with([](auto& g, auto&) { g.in = -1; }), "in"), "");
  CHECK(refused(with([](auto& g, auto&) { g.tasks = -1; }), "tasks"), "");
  CHECK(refused(with([](auto& g, auto&) { g.count = -1; }), "count"), "");
  CHECK(refused(with([](auto& g, auto&) { g.linears = nullptr; }), "linears"), "");
  CHECK(refused(with([](auto& g, auto&) { g.x = nullptr; }), "x"), "");
  CHECK(refused(with([](auto& g, auto&) { g.weights = nullptr; }), "weights"), "");
  CHECK(refused(with([](auto&, auto& l) { l.out = -1; }), "out"), "");
  CHECK(refused(with([](auto&, auto& l) { l.rank = 0; }), "rank"), "");
  CHECK(refused(with([](auto&, auto& l) { l.a = nullptr; }), "a"), "");
  CHECK(refused(with([](auto&, auto& l) { l.b_transposed = nullptr; }), "b_transposed"), "");
  CHECK(refused(with([](auto&, auto& l) { l.scaling = nullptr; }), "scaling"), "");
  CHECK(refused(with([](auto&, auto& l) { l.output = nullptr; }), "output"), "");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      const Wanted all = {true, true, true, true};
      compare({{1, 1}}, 1, 1, 1, 1, dtype, all, set);
      compare({{50, 3}, {7, 17}, {0, 2}, {20, 1}}, 2, 5, 33, 3, dtype, all, set);
      compare({{49, 8}, {13, 8}}, 2, 141, 50, 2, dtype, all, set);  // more tokens than are packed at once
      compare({{5, 2}}, 2, 3, 0, 2, dtype, all, set);
      compare({{5, 2}}, 2, 0, 4, 2, dtype, all, set);
      compare({{5, 2}}, 2, 3, 4, 0, dtype, all, set);
      for (int one = 0; one < 4; ++one) {
        compare({{50, 3}, {7, 17}}, 2, 5, 33, 3, dtype, {one == 0, one == 1, one == 2, one == 3}, set);
      }
    }
  });
  invalid();
  return report("routed_lora_backward");
}
