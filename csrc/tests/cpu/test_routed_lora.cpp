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
    const Status status =
        cpu::routed_lora({x.view().data, a.view().data, b.view().data, weights.data(), scaling.data(),
                          output.mutable_view().data, dtype, s.batch, s.tokens, s.in, s.out, s.tasks, s.rank});
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

void invalid() {
  float v[4] = {1, 1, 1, 1};
  const RoutedLoraArguments good = {v, v, v, v, v, v, DType::float32, 1, 1, 1, 1, 1, 1};
  const auto with = [&](auto change) {
    RoutedLoraArguments arguments = good;
    change(arguments);
    return cpu::routed_lora(arguments);
  };
  CHECK(refused(with([](auto& g) { g.batch = -1; }), "batch"), "");
  CHECK(refused(with([](auto& g) { g.tokens = -1; }), "tokens"), "");
  CHECK(refused(with([](auto& g) { g.in = -1; }), "in"), "");
  CHECK(refused(with([](auto& g) { g.out = -1; }), "out"), "");
  CHECK(refused(with([](auto& g) { g.tasks = -1; }), "tasks"), "");
  CHECK(refused(with([](auto& g) { g.rank = 0; }), "rank"), "");
  CHECK(refused(with([](auto& g) { g.dtype = static_cast<DType>(7); }), "dtype"), "");
  CHECK(refused(with([](auto& g) { g.x = nullptr; }), "x"), "");
  CHECK(refused(with([](auto& g) { g.a = nullptr; }), "a"), "");
  CHECK(refused(with([](auto& g) { g.b = nullptr; }), "b"), "");
  CHECK(refused(with([](auto& g) { g.weights = nullptr; }), "weights"), "");
  CHECK(refused(with([](auto& g) { g.scaling = nullptr; }), "scaling"), "");
  CHECK(refused(with([](auto& g) { g.output = nullptr; }), "output"), "");
  CHECK(with([](auto& g) { g.tokens = 0, g.x = nullptr, g.output = nullptr; }).ok(), "no tokens");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      const Shape shapes[] = {{1, 1, 1, 1, 1, 1},     {2, 1, 130, 65, 3, 8},   {1, 7, 65, 130, 2, 5},
                              {3, 17, 130, 49, 6, 8}, {2, 33, 65, 96, 1, 1},   {1, 5, 17, 7, 3, 17},
                              {2, 3, 7, 9, 0, 4},     {2, 3, 0, 9, 2, 4},      {1, 2, 3, 0, 2, 2},
                              {0, 2, 3, 4, 2, 2},     {1, 40, 200, 100, 9, 7}, {1, 3, 20, 50, 2, 70}};
      for (const Shape& shape : shapes) compare(shape, dtype, set);
    }
  });
  invalid();
  return report("routed_lora");
}
