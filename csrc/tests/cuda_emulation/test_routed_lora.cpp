// Emulated routed_lora against float64 loops: decoding and prefill sizes, odd sizes, no tasks, invalid arguments.
#include <memory>

#include "test_support.h"

using namespace test;

namespace {

void one(DType dtype, std::int64_t batch, std::int64_t tokens, std::int64_t in, std::int64_t out, std::int64_t tasks,
         std::int64_t rank, std::int64_t misaligned = 0) {
  GuardedMatrix x(dtype, batch * tokens, in, in, misaligned), a(dtype, tasks * rank, in, in),
      b(dtype, tasks * out, rank, rank, misaligned);
  x.fill_normal();
  a.fill_normal(0.3);
  b.fill_normal(0.3);
  std::vector<float> weights(static_cast<std::size_t>(batch * tasks)), scaling(static_cast<std::size_t>(tasks));
  for (auto& w : weights) w = static_cast<float>(normal());
  for (auto& s : scaling) s = static_cast<float>(1 + below(3));
  std::vector<double> want(static_cast<std::size_t>(batch * tokens * out)), size(want.size());
  for (std::int64_t row = 0; row < batch * tokens; ++row) {
    for (std::int64_t k = 0; k < tasks * rank; ++k) {
      double hidden = 0, magnitude = 0;
      for (std::int64_t i = 0; i < in; ++i) {
        hidden += x.value(row, i) * a.value(k, i);
        magnitude += std::fabs(x.value(row, i) * a.value(k, i));
      }
      const std::int64_t task = k / rank;
      const double scale = static_cast<double>(weights[static_cast<std::size_t>(row / tokens * tasks + task)]) *
                           scaling[static_cast<std::size_t>(task)];
      for (std::int64_t o = 0; o < out; ++o) {
        const double factor = scale * b.value(task * out + o, k % rank);
        want[static_cast<std::size_t>(row * out + o)] += hidden * factor;
        size[static_cast<std::size_t>(row * out + o)] += magnitude * std::fabs(factor);
      }
    }
  }
  hpa::RoutedLoraLinear linear{a.data(), b.data(), scaling.data(), nullptr, nullptr, out, rank};
  const hpa::RoutedLoraArguments arguments{x.data(), weights.data(), dtype, batch, tokens, in, tasks, &linear, 1};
  const double rounding = dtype == DType::float32 ? 0.0 : dtype == DType::float16 ? 5e-4 : 4e-3;
  in_every_order(
      "routed_lora",
      [&](Bytes& bytes) {
        GuardedMatrix output(dtype, batch * tokens, out, out, misaligned);
        Guarded workspace(hpa::cuda::routed_lora_workspace_bytes(arguments));
        linear.output = output.data();
        const Status status = hpa::cuda::routed_lora(arguments, workspace.as(), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(output.intact() && workspace.intact(), "guards");
        for (std::int64_t row = 0; row < batch * tokens; ++row) {
          for (std::int64_t o = 0; o < out; ++o) {
            const auto at = static_cast<std::size_t>(row * out + o);
            CHECK(std::fabs(output.value(row, o) - want[at]) <= 1e-6 * size[at] + rounding * std::fabs(want[at]) + 1e-7,
                  "%s row %ld column %ld: %g for %g", name_of(dtype), row, o, output.value(row, o), want[at]);
            const std::uint32_t bits = output.bits(row, o);
            append(bytes, &bits, 4);
          }
        }
      },
      3);
}

// Ten linears, hence two launches of each product: the bits of each alone, with and without something to add to.
void several(DType dtype, std::int64_t tokens) {
  constexpr std::int64_t kBatch = 2, kIn = 40, kTasks = 3, kCount = 10;
  GuardedMatrix x(dtype, kBatch * tokens, kIn, kIn);
  x.fill_normal();
  std::vector<float> weights(kBatch * kTasks), scaling(kTasks);
  for (auto& w : weights) w = static_cast<float>(normal());
  for (auto& w : scaling) w = static_cast<float>(normal());
  std::vector<std::unique_ptr<GuardedMatrix>> a, b, onto, alone, together;
  std::vector<hpa::RoutedLoraLinear> linears;
  for (std::int64_t l = 0; l < kCount; ++l) {
    const std::int64_t out = l == 4 ? 0 : 3 + 37 * (l % 7), rank = 1 + 5 * (l % 4);
    const std::int64_t misaligned = l % 3 == 2;
    a.push_back(std::make_unique<GuardedMatrix>(dtype, kTasks * rank, kIn, kIn));
    b.push_back(std::make_unique<GuardedMatrix>(dtype, kTasks * out, rank, rank, misaligned));
    onto.push_back(std::make_unique<GuardedMatrix>(dtype, kBatch * tokens, out, out, misaligned));
    alone.push_back(std::make_unique<GuardedMatrix>(dtype, kBatch * tokens, out, out));
    together.push_back(std::make_unique<GuardedMatrix>(dtype, kBatch * tokens, out, out, misaligned));
    for (auto* m : {a.back().get(), b.back().get(), onto.back().get()}) m->fill_normal();
    hpa::RoutedLoraLinear linear{
        a.back()->data(), b.back()->data(), scaling.data(), nullptr, alone.back()->data(), out, rank};
    const hpa::RoutedLoraArguments one{x.data(), weights.data(), dtype, kBatch, tokens, kIn, kTasks, &linear, 1};
    Guarded workspace(hpa::cuda::routed_lora_workspace_bytes(one));
    Status status = hpa::cuda::routed_lora(one, workspace.as(), nullptr);
    CHECK(status.ok(), "%s", status.message);
    if (l % 2 == 1) {
      GuardedMatrix plain = *alone.back();
      linear.onto = onto.back()->data();
      status = hpa::cuda::routed_lora(one, workspace.as(), nullptr);
      CHECK(status.ok(), "%s", status.message);
      for (std::int64_t row = 0; row < kBatch * tokens; ++row) {
        for (std::int64_t o = 0; o < out; ++o) {
          const double sum = plain.value(row, o) + onto.back()->value(row, o);
          const double rounding = dtype == DType::float32 ? 1.2e-7 : dtype == DType::float16 ? 5e-4 : 4e-3;
          CHECK(std::fabs(alone.back()->value(row, o) - sum) <= rounding * std::fabs(sum) + 1e-7, "sum");
        }
      }
    }
    linear.output = together.back()->data();
    linears.push_back(linear);
  }
  const hpa::RoutedLoraArguments all{x.data(), weights.data(), dtype,          kBatch, tokens,
                                     kIn,      kTasks,         linears.data(), kCount};
  Guarded workspace(hpa::cuda::routed_lora_workspace_bytes(all));
  const Status status = hpa::cuda::routed_lora(all, workspace.as(), nullptr);
  CHECK(status.ok(), "%s", status.message);
  CHECK(workspace.intact(), "workspace");
  for (std::int64_t l = 0; l < kCount; ++l) {
    const auto at = static_cast<std::size_t>(l);
    CHECK(together[at]->intact(), "guards");
    for (std::int64_t row = 0; row < kBatch * tokens; ++row) {
      for (std::int64_t o = 0; o < linears[at].out; ++o) {
        CHECK(together[at]->bits(row, o) == alone[at]->bits(row, o), "%s linear %ld row %ld column %ld", name_of(dtype),
              l, row, o);
      }
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : kDTypes) {
    one(dtype, 2, 1, 72, 136, 3, 8);
    one(dtype, 2, 5, 40, 20, 2, 4);
    one(dtype, 1, 7, 33, 9, 3, 3, 1);
    one(dtype, 3, 23, 16, 12, 5, 8);
    one(dtype, 1, 1, 1, 1, 1, 1);
    one(dtype, 1, 3, 300, 5, 1, 2);
    one(dtype, 2, 3, 0, 6, 2, 2);
    one(dtype, 2, 3, 6, 6, 0, 2);
    one(dtype, 2, 3, 6, 0, 2, 2);
    one(dtype, 0, 3, 6, 6, 2, 2);
  }
  one(DType::bfloat16, 5, 103, 16, 6, 9, 8);  // more than 32 blocks of rows: the wide kernel
  one(DType::float16, 1, 515, 13, 5, 3, 3);
  for (DType dtype : kDTypes) {
    several(dtype, 5);
    several(dtype, 1);
  }
  several(DType::bfloat16, 257);
  std::vector<std::uint16_t> data(4096);
  std::vector<float> weights(8, 1.0f), workspace(64);
  std::vector<std::uint16_t> output(256);
  const hpa::RoutedLoraLinear fine_linear{data.data(), data.data(), weights.data(), nullptr, output.data(), 8, 4};
  const hpa::RoutedLoraArguments fine{data.data(), weights.data(), DType::bfloat16, 1, 2, 8, 2, nullptr, 1};
  const auto changed = [&](auto change, void* w) {
    hpa::RoutedLoraLinear linear = fine_linear;
    hpa::RoutedLoraArguments arguments = fine;
    arguments.linears = &linear;
    change(arguments, linear);
    return hpa::cuda::routed_lora(arguments, w, nullptr);
  };
  Guarded aligned(64 * 4);
  expect_launch_failures("routed_lora", [&] { return changed([](auto&, auto&) {}, aligned.as()); });
  expect_invalid("no x", changed([](auto& r, auto&) { r.x = nullptr; }, aligned.as()));
  expect_invalid("no a", changed([](auto&, auto& l) { l.a = nullptr; }, aligned.as()));
  expect_invalid("no b", changed([](auto&, auto& l) { l.b = nullptr; }, aligned.as()));
  expect_invalid("no weights", changed([](auto& r, auto&) { r.weights = nullptr; }, aligned.as()));
  expect_invalid("no scaling", changed([](auto&, auto& l) { l.scaling = nullptr; }, aligned.as()));
  expect_invalid("no output", changed([](auto&, auto& l) { l.output = nullptr; }, aligned.as()));
  expect_invalid("no linears", changed([](auto& r, auto&) { r.linears = nullptr; }, aligned.as()));
  expect_invalid("no workspace", changed([](auto&, auto&) {}, nullptr));
  expect_invalid("negative rank", changed([](auto&, auto& l) { l.rank = -1; }, aligned.as()));
  expect_invalid("unknown dtype", changed([](auto& r, auto&) { r.dtype = static_cast<DType>(5); }, aligned.as()));
  return report("cuda_emulation_routed_lora");
}
