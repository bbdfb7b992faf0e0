// Rounding to each dtype, through project_merge with coefficient 0: every 16-bit pattern comes back, and float32
// values around every rounding boundary of float16 and bfloat16 go where nearest-even says.
#include "check.h"
#include "data.h"
#include "hpa/column_scores.h"
#include "hpa/project_merge.h"

using namespace hpa;
using namespace hpa::test;

namespace {

void all_patterns(DType dtype, const std::string& set) {
  const std::int64_t count = 65536;
  GuardedMatrix zero(1, count, dtype, 0, 0), all(1, count, dtype, 0, 0), out(1, count, dtype, 0, 0);
  for (std::int64_t j = 0; j < count; ++j) {
    zero.set_bits(0, j, 0);
    all.set_bits(0, j, static_cast<std::uint32_t>(j));
  }
  const std::vector<std::uint8_t> mask(count);
  const float coefficient = 0;
  CHECK(
      cpu::project_merge(zero.view(), all.view(), mask.data(), MaskAxis::input, &coefficient, out.mutable_view()).ok(),
      set);
  for (std::int64_t j = 0; j < count; ++j) {
    const bool nan = std::isnan(all.at(0, j));
    CHECK(nan ? std::isnan(out.at(0, j)) : out.bits(0, j) == all.bits(0, j),
          set + " " + name_of(dtype) + " " + std::to_string(j));
  }
}

// w_new - c * w_old with w_new = a and w_old = b reaches the midpoint between two neighbours, and just beside it.
void midpoints(DType dtype, const std::string& set) {
  const std::uint32_t largest = dtype == DType::float16 ? 0x7bffu : 0x7f7fu;
  const std::int64_t count = largest;
  GuardedMatrix steps(1, count, dtype, 0, 0), values(1, count, dtype, 0, 0), out(1, count, dtype, 0, 0);
  const std::vector<std::uint8_t> mask(count);
  for (const float coefficient : {-0.5f, -0.49999997f, -0.50000006f, 0.5f}) {
    for (std::int64_t j = 0; j < count; ++j) {
      const std::uint32_t pattern = static_cast<std::uint32_t>(j);
      values.set_bits(0, j, pattern);
      steps.set(0, j, decode(pattern + (pattern < largest ? 1 : 0), dtype) - decode(pattern, dtype));
    }
    CHECK(
        cpu::project_merge(steps.view(), values.view(), mask.data(), MaskAxis::input, &coefficient, out.mutable_view())
            .ok(),
        set);
    for (std::int64_t j = 0; j < count; ++j) {
      const float product = coefficient * static_cast<float>(steps.at(0, j));
      const float exact = static_cast<float>(values.at(0, j)) - product;
      CHECK(out.bits(0, j) == encode(exact, dtype), set + " " + name_of(dtype) + " " + std::to_string(j));
    }
  }
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      all_patterns(dtype, set);
      midpoints(dtype, set);
    }
  });
  return report("conversion");
}
