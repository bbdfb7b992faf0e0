#include <algorithm>

#include "check.h"
#include "data.h"
#include "hpa/routed_lora.h"

using namespace hpa;
using namespace hpa::test;

namespace {

struct Shape {
  std::int64_t batch, tokens, in, out, tasks, rank;
};

void compare(const Shape& s, DType dtype, const std::string& set) {
  std::string context = set + " " + name_of(dtype);
  for (const std::int64_t n : {s.batch, s.tokens, s.in, s.out, s.tasks, s.rank})
    context.append(" ").append(std::to_string(n));
  Random random(static_cast<unsigned>(s.in * 7 + s.out));
  // Contiguous, as the operation takes them; a guard lies behind the output.
  GuardedMatrix x(s.batch * s.tokens, s.in, dtype, 0), a(s.tasks * s.rank, s.in, dtype, 0),
      b(s.tasks * s.out, s.rank, dtype, 0), output(s.batch * s.tokens, s.out, dtype, 0), first = output;
  x.fill_normal(random);
  a.fill_normal(random, 0.1);
  b.fill_normal(random, 0.1);
  std::vector<float> weights(s.batch * s.tasks), scaling(s.tasks);
  for (auto& w : weights) w = static_cast<float>(random.normal());
  for (auto& w : scaling) w = static_cast<float>(1 + random.chance(0.5));
  for (const std::int32_t threads : {1, 2, 3}) {
    cpu::set_thread_count(threads);
    const RoutedLoraLinear linear = {a.view().data, b.view().data, scaling.data(), nullptr, output.mutable_view().data,
                                     s.out,         s.rank};
    const Status status =
        cpu::routed_lora({x.view().data, weights.data(), dtype, s.batch, s.tokens, s.in, s.tasks, &linear, 1});
    CHECK(status.ok(), context + status.message);
    CHECK(output.guards_intact(), context);
    if (threads == 1) first = output;
    CHECK(output == first, context + " thread count");
  }
  const double unit = dtype == DType::float32 ? 0 : dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
  for (std::int64_t t = 0; t < s.batch * s.tokens; ++t) {
    std::vector<double> mid(s.tasks * s.rank), mid_bound(s.tasks * s.rank);
    for (std::int64_t r = 0; r < s.tasks * s.rank; ++r) {
      const double factor = double(weights[t / s.tokens * s.tasks + r / s.rank]) * scaling[r / s.rank];
      for (std::int64_t k = 0; k < s.in; ++k) {
        mid[r] += factor * x.at(t, k) * a.at(r, k);
        mid_bound[r] += std::abs(factor * x.at(t, k) * a.at(r, k));
      }
    }
    for (std::int64_t j = 0; j < s.out; ++j) {
      double sum = 0, bound = 0;
      for (std::int64_t r = 0; r < s.tasks * s.rank; ++r) {
        const double factor = b.at(r / s.rank * s.out + j, r % s.rank);
        sum += factor * mid[r];
        bound += std::abs(factor) * mid_bound[r];
      }
      CHECK(std::abs(output.at(t, j) - sum) <= 1e-6 * bound + 1.01 * unit * std::abs(sum) + 1e-7, context);
    }
  }
}

// Several linears together against each alone, with and without something to add to, in place too: the same bits.
void several(DType dtype, const std::string& set) {
  const std::string context = set + " " + name_of(dtype) + " several";
  const std::int64_t batch = 2, tokens = 21, in = 70, tasks = 3, count = 5;
  const std::int64_t outs[] = {200, 0, 7, 49, 330}, ranks[] = {8, 3, 1, 30, 90};
  Random random(5);
  GuardedMatrix x(batch * tokens, in, dtype, 0);
  x.fill_normal(random);
  std::vector<float> weights(batch * tasks), scaling(tasks);
  for (auto& w : weights) w = static_cast<float>(random.normal());
  for (auto& w : scaling) w = static_cast<float>(random.normal());
  std::vector<GuardedMatrix> a, b, onto, alone, together;
  std::vector<RoutedLoraLinear> linears;
  for (std::int64_t l = 0; l < count; ++l) {
    a.emplace_back(tasks * ranks[l], in, dtype, 0);
    b.emplace_back(tasks * outs[l], ranks[l], dtype, 0);
    onto.emplace_back(batch * tokens, outs[l], dtype, 0);
    for (GuardedMatrix* m : {&a.back(), &b.back(), &onto.back()}) m->fill_normal(random);
    alone.push_back(onto.back());
    together.push_back(onto.back());
  }
  // Not at all, from another place, in place.
  for (std::int64_t l = 0; l < count; ++l) {
    const auto linear_to = [&](GuardedMatrix& output, const void* from) {
      return RoutedLoraLinear{a[l].view().data,           b[l].view().data, scaling.data(), from,
                              output.mutable_view().data, outs[l],          ranks[l]};
    };
    GuardedMatrix plain = onto[l];
    const auto run = [&](const RoutedLoraLinear& one) {
      const Status status = cpu::routed_lora({x.view().data, weights.data(), dtype, batch, tokens, in, tasks, &one, 1});
      CHECK(status.ok(), context + status.message);
    };
    run(linear_to(plain, nullptr));
    run(linear_to(alone[l], l == 0 ? nullptr : onto[l].view().data));
    for (std::int64_t t = 0; t < batch * tokens && l != 0; ++t) {
      for (std::int64_t j = 0; j < outs[l]; ++j) {
        CHECK(alone[l].at(t, j) == round_to(plain.at(t, j) + onto[l].at(t, j), dtype), context + " sum");
      }
    }
    linears.push_back(linear_to(together[l], l == 0   ? nullptr
                                             : l == 4 ? together[l].view().data
                                                      : onto[l].view().data));
  }
  for (const std::int32_t threads : {1, 3}) {
    cpu::set_thread_count(threads);
    for (std::int64_t t = 0; t < batch * tokens; ++t) {
      for (std::int64_t j = 0; j < outs[4]; ++j) together[4].set_bits(t, j, onto[4].bits(t, j));
    }
    const Status status =
        cpu::routed_lora({x.view().data, weights.data(), dtype, batch, tokens, in, tasks, linears.data(), count});
    CHECK(status.ok(), context + status.message);
    for (std::int64_t l = 0; l < count; ++l) {
      CHECK(together[l].guards_intact(), context);
      CHECK(together[l] == alone[l], context + " " + std::to_string(l));
    }
  }
}

// One token after the other, and three at a time: the bits of all together, though few and many go other ways.
void few_and_many(DType dtype, const std::string& set) {
  const std::int64_t tokens = 70, in = 3003, out = 50, tasks = 2, rank = 5;
  Random random(9);
  GuardedMatrix x(tokens, in, dtype, 0), a(tasks * rank, in, dtype, 0), b(tasks * out, rank, dtype, 0),
      together(tokens, out, dtype, 0), apart = together;
  for (GuardedMatrix* m : {&x, &a, &b}) m->fill_normal(random);
  const std::vector<float> weights = {0.25f, 0.75f}, scaling = {2, 3};
  const auto run = [&](std::int64_t first, std::int64_t count, GuardedMatrix& output) {
    const std::int64_t size = static_cast<std::int64_t>(size_of(dtype));
    const RoutedLoraLinear linear = {a.view().data,
                                     b.view().data,
                                     scaling.data(),
                                     nullptr,
                                     static_cast<char*>(output.mutable_view().data) + first * out * size,
                                     out,
                                     rank};
    const Status status = cpu::routed_lora({static_cast<const char*>(x.view().data) + first * in * size, weights.data(),
                                            dtype, 1, count, in, tasks, &linear, 1});
    CHECK(status.ok(), set + status.message);
  };
  run(0, tokens, together);
  for (const std::int64_t step : {1, 3}) {
    for (std::int64_t t = 0; t < tokens; t += step) run(t, std::min(step, tokens - t), apart);
    CHECK(apart == together, set + " " + name_of(dtype) + " step " + std::to_string(step));
  }
}

void invalid() {
  float v[4] = {1, 1, 1, 1};
  const RoutedLoraLinear good_linear = {v, v, v, nullptr, v, 1, 1};
  const RoutedLoraArguments good = {v, v, DType::float32, 1, 1, 1, 1, nullptr, 2};
  const auto with = [&](auto change) {
    RoutedLoraLinear linears[] = {good_linear, good_linear};
    RoutedLoraArguments arguments = good;
    arguments.linears = linears;
    change(arguments, linears[1]);
    return cpu::routed_lora(arguments);
  };
  CHECK(with([](auto&, auto&) {}).ok(), "");
  CHECK(refused(with([](auto& g, auto&) { g.batch = -1; }), "batch"), "");
  CHECK(refused(with([](auto& g, auto&) { g.tokens = -1; }), "tokens"), "");
  CHECK(refused(with([](auto& g, auto&) { g.in = -1; }), "in"), "");
  CHECK(refused(with([](auto& g, auto&) { g.tasks = -1; }), "tasks"), "");
  CHECK(refused(with([](auto& g, auto&) { g.count = -1; }), "count"), "");
  CHECK(refused(with([](auto& g, auto&) { g.linears = nullptr; }), "linears"), "");
  CHECK(refused(with([](auto& g, auto&) { g.dtype = static_cast<DType>(7); }), "dtype"), "");
  CHECK(refused(with([](auto& g, auto&) { g.x = nullptr; }), "x"), "");
  CHECK(refused(with([](auto& g, auto&) { g.weights = nullptr; }), "weights"), "");
  CHECK(refused(with([](auto&, auto& l) { l.out = -1; }), "out"), "");
  CHECK(refused(with([](auto&, auto& l) { l.rank = 0; }), "rank"), "");
  CHECK(refused(with([](auto&, auto& l) { l.a = nullptr; }), "a"), "");
  CHECK(refused(with([](auto&, auto& l) { l.b = nullptr; }), "b"), "");
  CHECK(refused(with([](auto&, auto& l) { l.scaling = nullptr; }), "scaling"), "");
  CHECK(refused(with([](auto&, auto& l) { l.output = nullptr; }), "output"), "");
  CHECK(with([](auto& g, auto& l) { g.tokens = 0, g.x = nullptr, l.output = nullptr; }).ok(), "no tokens");
  CHECK(with([](auto& g, auto&) { g.linears = nullptr, g.count = 0; }).ok(), "no linears");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      const Shape shapes[] = {{1, 1, 1, 1, 1, 1},     {2, 1, 130, 65, 3, 8},   {1, 7, 65, 130, 2, 5},
                              {3, 17, 130, 49, 6, 8}, {2, 33, 65, 96, 1, 1},   {1, 5, 17, 7, 3, 17},
                              {2, 3, 7, 9, 0, 4},     {2, 3, 0, 9, 2, 4},      {1, 2, 3, 0, 2, 2},
                              {0, 2, 3, 4, 2, 2},     {1, 40, 200, 100, 9, 7}, {1, 3, 20, 50, 2, 70},
                              {1, 70, 3003, 5, 2, 4}};
      for (const Shape& shape : shapes) compare(shape, dtype, set);
      several(dtype, set);
      few_and_many(dtype, set);
    }
  });
  invalid();
  return report("routed_lora");
}
