// Emulated column_mask against a stable sort: ties, NaN, infinities, signed zeros, eligibility, clamped counts.
#include <algorithm>
#include <numeric>

#include "cuda/item_table.cuh"
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

// `count` layers of different widths: what each gets alone, in so many launches. Counts in memory and in the item.
void list(int count, int launches) {
  const std::int64_t widths[] = {7, 0, 600, 1, 65};
  std::vector<std::vector<float>> scores;
  std::vector<std::vector<std::uint8_t>> eligible;
  std::vector<Guarded> masks;
  masks.reserve(static_cast<std::size_t>(count));
  std::vector<std::int64_t> counts;
  for (int i = 0; i < count; ++i) {
    const std::int64_t width = widths[i % 5];
    scores.emplace_back(width), eligible.emplace_back(width), masks.emplace_back(static_cast<std::size_t>(width));
    for (float& s : scores.back()) s = static_cast<float>(below(5));
    for (auto& e : eligible.back()) e = static_cast<std::uint8_t>(below(3));
    counts.push_back(i % 6 == 0 ? width + 3 : below(width + 1));
  }
  std::vector<hpa::ColumnMaskItem> items;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    items.push_back({{scores[i].data(), i % 3 == 0 ? eligible[i].data() : nullptr, i % 2 == 0 ? &counts[i] : nullptr,
                      masks[i].as<std::uint8_t>(), 1, widths[i % 5]},
                     i % 2 == 0 ? 77 : counts[i]});
  }
  const std::int64_t length = static_cast<std::int64_t>(items.size());
  hpa_emulation::settings() = {};
  CHECK(hpa::cuda::column_mask_list(items.data(), length, nullptr).ok(), "list");
  CHECK(hpa_emulation::settings().launches == launches, "%d launches", hpa_emulation::settings().launches);
  for (std::size_t i = 0; i < items.size(); ++i) {
    hpa::ColumnMaskArguments alone = items[i].arguments;
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(alone.columns) + 1);
    alone.counts = &counts[i];
    alone.mask = mask.data();
    CHECK(hpa::cuda::column_mask(alone, nullptr).ok(), "alone");
    CHECK(masks[i].intact(), "guards of item %zu", i);
    CHECK(std::equal(mask.begin(), mask.end() - 1, masks[i].as<std::uint8_t>()), "item %zu as alone", i);
    const std::int64_t candidates =
        alone.eligible == nullptr
            ? alone.columns
            : std::count_if(alone.eligible, alone.eligible + alone.columns, [](auto e) { return e != 0; });
    const std::int64_t chosen = std::count(mask.begin(), mask.end() - 1, std::uint8_t{1});
    CHECK(chosen == std::min(counts[i], candidates), "item %zu chose %ld", i, chosen);
  }
}

// Items cut into several launches where their blocks do not fit into one grid: every block of every item, once.
void cut_grids() {
  for (const int count : {3, 16, 17, 100}) {
    std::vector<int> items;
    std::int64_t total = 0;
    for (int i = 0; i < count; ++i) items.push_back(i % 5 == 3 ? 0 : 1 + i % 7), total += items.back();
    std::vector<int> seen;  // the item of every block, in order
    int launches = 0;
    const Status status = hpa::cuda::launch_items(
        items.data(), count, [](int blocks) { return std::int64_t{blocks}; },
        [&](const auto& table, dim3 grid) {
          ++launches;
          CHECK(grid.x <= 10 && grid.x > 0, "%u blocks", grid.x);
          for (unsigned block = 0; block < grid.x; ++block) {
            const int index = hpa::cuda::item_of(table, block);
            const unsigned own = block - table.first_block[index];
            CHECK(own < static_cast<unsigned>(table.items[index]), "block %u of %d", own, table.items[index]);
            if (own == 0) seen.push_back(table.items[index]);
            --total;
          }
          return Status{};
        },
        10);
    items.erase(std::remove(items.begin(), items.end(), 0), items.end());
    CHECK(status.ok() && seen == items && total == 0, "%d items", count);
    CHECK(launches > 1 || count == 3, "%d items in %d launches", count, launches);
  }
}

}  // namespace

int main() {
  cut_grids();
  list(5, 1);
  list(40, 1);
  list(300, 2);
  CHECK(hpa::cuda::column_mask_list(nullptr, 0, nullptr).ok(), "empty list");
  expect_invalid("no items", hpa::cuda::column_mask_list(nullptr, 1, nullptr));
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
