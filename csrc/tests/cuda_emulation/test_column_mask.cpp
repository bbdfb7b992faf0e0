// Emulated column_mask against a stable sort: ties, NaN, infinities, signed zeros, eligibility, clamped counts.
#include <algorithm>
#include <numeric>

#include "test_support.h"

using namespace test;

namespace {

// a before b: higher first, NaN below everything, then the lower index.
bool before(float a, float b) {
  if (std::isnan(a)) return false;
  return std::isnan(b) || a > b;
}

void one(std::int64_t batch, std::int64_t columns, int kinds, bool with_eligible) {
  const std::size_t total = static_cast<std::size_t>(batch * columns);
  std::vector<float> scores(total);
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 1.0f, -1.0f, 1e-42f, -1e-42f};
  for (auto& s : scores) {
    if (kinds == 0) s = static_cast<float>(normal());
    if (kinds == 1) s = special[below(10)];
    if (kinds == 2) s = static_cast<float>(below(3));
    if (kinds == 3) s = 0.25f;
    if (kinds == 4) s = std::ldexp(static_cast<float>(normal()), static_cast<int>(below(200)) - 100);
  }
  std::vector<std::uint8_t> eligible(total);
  for (auto& e : eligible) e = static_cast<std::uint8_t>(below(3) == 0 ? 0 : 1 + below(255));
  std::vector<std::int64_t> counts(static_cast<std::size_t>(batch));
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t choices[] = {below(columns + 1), 0, columns, -3, columns + 5, 1, std::int64_t{1} << 40};
    counts[static_cast<std::size_t>(b)] = choices[b % 7];
  }
  std::vector<std::uint8_t> want(total, 0);
  for (std::int64_t b = 0; b < batch; ++b) {
    const float* row = scores.data() + b * columns;
    std::vector<std::int64_t> order;
    for (std::int64_t j = 0; j < columns; ++j) {
      if (!with_eligible || eligible[static_cast<std::size_t>(b * columns + j)] != 0) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return before(row[i], row[j]); });
    const std::int64_t k =
        std::clamp<std::int64_t>(counts[static_cast<std::size_t>(b)], 0, static_cast<std::int64_t>(order.size()));
    for (std::int64_t i = 0; i < k; ++i)
      want[static_cast<std::size_t>(b * columns + order[static_cast<std::size_t>(i)])] = 1;
  }
  in_every_order(
      "column_mask",
      [&](Bytes& bytes) {
        Guarded mask(total);
        const Status status = hpa::cuda::column_mask({scores.data(), with_eligible ? eligible.data() : nullptr,
                                                      counts.data(), mask.as<std::uint8_t>(), batch, columns},
                                                     nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(mask.intact(), "guards");
        CHECK(std::equal(want.begin(), want.end(), mask.as<std::uint8_t>()),
              "batch %ld, columns %ld, kinds %d, eligible %d", batch, columns, kinds, with_eligible);
        append(bytes, mask.as(), total);
      },
      3);
}

}  // namespace

int main() {
  for (bool with_eligible : {false, true}) {
    for (int kinds = 0; kinds < 5; ++kinds) {
      one(7, 1, kinds, with_eligible);
      one(7, 40, kinds, with_eligible);
      one(7, 513, kinds, with_eligible);
      one(1, 3001, kinds, with_eligible);
    }
    one(0, 5, 0, with_eligible);
    one(5, 0, 0, with_eligible);
  }
  std::vector<float> scores(8, 1.0f);
  std::vector<std::uint8_t> mask(8);
  const std::int64_t count = 3;
  const hpa::ColumnMaskArguments fine{scores.data(), nullptr, &count, mask.data(), 1, 8};
  const auto changed = [&](auto change) {
    hpa::ColumnMaskArguments arguments = fine;
    change(arguments);
    return hpa::cuda::column_mask(arguments, nullptr);
  };
  expect_launch_failures("column_mask", [&] { return hpa::cuda::column_mask(fine, nullptr); });
  expect_invalid("no scores", changed([](auto& a) { a.scores = nullptr; }));
  expect_invalid("no counts", changed([](auto& a) { a.counts = nullptr; }));
  expect_invalid("no mask", changed([](auto& a) { a.mask = nullptr; }));
  expect_invalid("negative batch", changed([](auto& a) { a.batch = -1; }));
  expect_invalid("too many columns", changed([](auto& a) { a.columns = std::int64_t{1} << 31; }));
  return report("cuda_emulation_column_mask");
}
