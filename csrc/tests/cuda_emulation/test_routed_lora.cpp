// Emulated routed_lora against float64 loops: decoding and prefill sizes, odd sizes, no tasks, invalid arguments.
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
  hpa::RoutedLoraArguments arguments{x.data(), a.data(), b.data(), weights.data(), scaling.data(),
                                     nullptr,  dtype,    batch,    tokens,         in,
                                     out,      tasks,    rank};
  const double rounding = dtype == DType::float32 ? 0.0 : dtype == DType::float16 ? 5e-4 : 4e-3;
  in_every_order(
      "routed_lora",
      [&](Bytes& bytes) {
        GuardedMatrix output(dtype, batch * tokens, out, out, misaligned);
        Guarded workspace(hpa::cuda::routed_lora_workspace_bytes(arguments));
        arguments.output = output.data();
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
  std::vector<std::uint16_t> data(4096);
  std::vector<float> weights(8, 1.0f), workspace(64);
  std::vector<std::uint16_t> output(256);
  const hpa::RoutedLoraArguments fine{data.data(),
                                      data.data(),
                                      data.data(),
                                      weights.data(),
                                      weights.data(),
                                      output.data(),
                                      DType::bfloat16,
                                      1,
                                      2,
                                      8,
                                      8,
                                      2,
                                      4};
  const auto changed = [&](auto change, void* w) {
    hpa::RoutedLoraArguments arguments = fine;
    change(arguments);
    return hpa::cuda::routed_lora(arguments, w, nullptr);
  };
  Guarded aligned(64 * 4);
  expect_launch_failures("routed_lora", [&] { return hpa::cuda::routed_lora(fine, aligned.as(), nullptr); });
  expect_invalid("no x", changed([](auto& r) { r.x = nullptr; }, aligned.as()));
  expect_invalid("no a", changed([](auto& r) { r.a = nullptr; }, aligned.as()));
  expect_invalid("no b", changed([](auto& r) { r.b = nullptr; }, aligned.as()));
  expect_invalid("no weights", changed([](auto& r) { r.weights = nullptr; }, aligned.as()));
  expect_invalid("no scaling", changed([](auto& r) { r.scaling = nullptr; }, aligned.as()));
  expect_invalid("no output", changed([](auto& r) { r.output = nullptr; }, aligned.as()));
  expect_invalid("no workspace", changed([](auto&) {}, nullptr));
  expect_invalid("negative rank", changed([](auto& r) { r.rank = -1; }, aligned.as()));
  expect_invalid("unknown dtype", changed([](auto& r) { r.dtype = static_cast<DType>(5); }, aligned.as()));
  return report("cuda_emulation_routed_lora");
}
