// HPA on one random linear layer, from C++ alone: gram -> inverse_diagonal -> column_scores -> column_mask ->
// project_merge. Exits with 0 only if the retained columns of the result are bit-identical to the old weight's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "hpa/hpa.h"

namespace {

constexpr std::int64_t kTokens = 512, kIn = 256, kOut = 192, kRetained = kIn / 10;
constexpr double kDamping = 0.01;

void require(const hpa::Status& status, const char* operation) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", operation, status.message);
  std::exit(2);
}

hpa::ConstMatrix view(const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
  return {values.data(), hpa::DType::float32, rows, columns, columns};
}

}  // namespace

int main() {
  std::printf("CUDA devices: %d; this example runs on the CPU with %s\n", hpa::cuda::device_count(),
              hpa::cpu::instruction_set());
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t count, float scale) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * normal(engine);
    return values;
  };
  const std::vector<float> x = random(kTokens * kIn, 1);
  const std::vector<float> w_old = random(kOut * kIn, 0.1f);
  std::vector<float> w_new = random(kOut * kIn, 0.01f);
  for (std::size_t i = 0; i < w_new.size(); ++i) w_new[i] += w_old[i];

  const hpa::BuildInfo build = hpa::build_info();
  std::printf("hpa %s, %s, instruction set %s of %s, %d threads\n", build.version, build.compiler,
              hpa::cpu::instruction_set(), hpa::cpu::available_instruction_sets(), hpa::cpu::thread_count());

  // H = 2/n sum x^T x; the factor is the caller's.
  std::vector<float> h(kIn * kIn);
  require(hpa::cpu::gram_accumulate(view(x, kTokens, kIn), nullptr, h.data(), kIn), "gram_accumulate");
  for (float& value : h) value *= 2.0f / kTokens;
  std::printf("gram              %lld tokens, H[0][0] = %.4f\n", static_cast<long long>(kTokens), h[0]);

  std::vector<float> diagonal(kIn);
  std::int32_t failed_minor = 0;
  float smallest_pivot = 0;
  require(hpa::cpu::inverse_diagonal({h.data(), 1, kIn, kIn * kIn, kIn}, kDamping, hpa::Precision::float32,
                                     {diagonal.data(), &failed_minor, &smallest_pivot}),
          "inverse_diagonal");
  std::printf("inverse_diagonal  failed minor %d, smallest pivot %.3f\n", failed_minor, smallest_pivot);
  if (failed_minor != 0) return 3;

  std::vector<float> scores(kIn);
  float inner_product = 0, old_squared_norm = 0;
  require(hpa::cpu::column_scores(view(w_old, kOut, kIn), view(w_new, kOut, kIn),
                                  {scores.data(), &inner_product, &old_squared_norm}),
          "column_scores");
  for (std::int64_t j = 0; j < kIn; ++j) scores[j] /= diagonal[j];
  const float coefficient = old_squared_norm > 0 ? inner_product / old_squared_norm : 0;
  std::printf("column_scores     projection coefficient %.5f\n", coefficient);

  std::vector<std::uint8_t> mask(kIn);
  require(hpa::cpu::column_mask({scores.data(), nullptr, &kRetained, mask.data(), 1, kIn}), "column_mask");

  std::vector<float> result(kOut * kIn);
  require(hpa::cpu::project_merge(view(w_old, kOut, kIn), view(w_new, kOut, kIn), mask.data(), hpa::MaskAxis::input,
                                  &coefficient, {result.data(), hpa::DType::float32, kOut, kIn, kIn}),
          "project_merge");

  std::int64_t retained = 0, different = 0;
  for (std::int64_t j = 0; j < kIn; ++j) {
    if (mask[j] == 0) continue;
    ++retained;
    for (std::int64_t i = 0; i < kOut; ++i) {
      different += std::memcmp(&result[i * kIn + j], &w_old[i * kIn + j], sizeof(float)) != 0;
    }
  }
  std::printf("project_merge     %lld of %lld columns retained, %lld of their elements differ from the old weight\n",
              static_cast<long long>(retained), static_cast<long long>(kIn), static_cast<long long>(different));
  return retained == kRetained && different == 0 ? 0 : 1;
}
