#include <algorithm>
#include <numeric>

#include "check.h"
#include "data.h"
#include "hpa/column_mask.h"

using namespace hpa;
using namespace hpa::test;

namespace {

// The definition: sort by score descending, NaN last, ties by index; take the first ones.
std::vector<std::uint8_t> reference(const float* scores, const std::uint8_t* eligible, std::int64_t count,
                                    std::int64_t columns) {
  std::vector<std::int64_t> order;
  for (std::int64_t j = 0; j < columns; ++j) {
    if (eligible == nullptr || eligible[j] != 0) order.push_back(j);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return std::isnan(scores[b]) ? !std::isnan(scores[a]) : scores[a] > scores[b];
  });
  std::vector<std::uint8_t> mask(columns);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, order.size()); ++i) mask[order[i]] = 1;
  return mask;
}

void compare(std::int64_t batch, std::int64_t columns, bool with_eligible) {
  const std::string context = std::to_string(batch) + "x" + std::to_string(columns);
  Random random(static_cast<unsigned>(batch * 31 + columns));
  std::vector<float> scores(batch * columns);
  std::vector<std::uint8_t> eligible(batch * columns), mask(batch * columns + 4, 9);
  const float special[] = {NAN, -NAN, 0.0f, -0.0f, INFINITY, -INFINITY, 1e-45f, -1e-45f, 1.0f};
  for (std::size_t i = 0; i < scores.size(); ++i) {
    scores[i] = random.chance(0.3) ? special[i % 9] : std::round(static_cast<float>(random.normal()) * 4);
    eligible[i] = random.chance(0.7) ? 2 : 0;
  }
  std::vector<std::int64_t> counts(batch);
  for (std::int64_t b = 0; b < batch; ++b)
    counts[b] = b == 0 ? columns / 2 : b == 1 ? -3 : b == 2 ? columns + 5 : b * columns / (2 * batch);
  for (const std::int32_t threads : {1, 2, 3}) {
    cpu::set_thread_count(threads);
    std::fill(mask.begin(), mask.end(), std::uint8_t{9});
    const Status status = cpu::column_mask(
        {scores.data(), with_eligible ? eligible.data() : nullptr, counts.data(), mask.data(), batch, columns});
    CHECK(status.ok(), context + status.message);
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto expected = reference(scores.data() + b * columns,
                                      with_eligible ? eligible.data() + b * columns : nullptr, counts[b], columns);
      CHECK(std::equal(expected.begin(), expected.end(), mask.begin() + b * columns), context);
    }
    CHECK(std::all_of(mask.end() - 4, mask.end(), [](std::uint8_t v) { return v == 9; }), context + " guard");
  }
}

// Layers of different widths, with counts in memory and in the item.
void list() {
  const std::int64_t columns[] = {7, 0, 4096, 1, 65};
  Random random(5);
  std::vector<std::vector<float>> scores;
  std::vector<std::vector<std::uint8_t>> eligible, masks;
  std::vector<std::int64_t> counts(50);
  std::vector<ColumnMaskItem> items;
  for (int i = 0; i < 50; ++i) {
    const std::int64_t width = columns[i % 5];
    scores.emplace_back(width), eligible.emplace_back(width), masks.emplace_back(width + 4, std::uint8_t{9});
    for (float& score : scores.back()) score = std::round(static_cast<float>(random.normal()) * 4);
    for (auto& flag : eligible.back()) flag = random.chance(0.7) ? 2 : 0;
    counts[i] = i % 4 == 0 ? width : i * width / 60;
  }
  for (int i = 0; i < 50; ++i) {
    const ColumnMaskArguments arguments = {scores[i].data(),
                                           i % 3 == 0 ? eligible[i].data() : nullptr,
                                           i % 2 == 0 ? &counts[i] : nullptr,
                                           masks[i].data(),
                                           1,
                                           columns[i % 5]};
    items.push_back({arguments, i % 2 == 0 ? -99 : counts[i]});
  }
  for (const std::int32_t threads : {1, 2}) {
    cpu::set_thread_count(threads);
    CHECK(cpu::column_mask_list(items.data(), std::ssize(items)).ok(), "list");
    for (int i = 0; i < 50; ++i) {
      const auto& [s, e, c, m, batch, width] = items[i].arguments;
      const auto expected = reference(s, e, counts[i], width);
      CHECK(std::equal(expected.begin(), expected.end(), m), "list, item " + std::to_string(i));
      CHECK(std::all_of(m + width, m + width + 4, [](std::uint8_t v) { return v == 9; }), "list guard");
    }
  }
  CHECK(cpu::column_mask_list(nullptr, 0).ok(), "empty list");
  CHECK(refused(cpu::column_mask_list(nullptr, 2), "items"), "no items");
  items[4].arguments.mask = nullptr;
  items[4].arguments.columns = 3;
  CHECK(refused(cpu::column_mask_list(items.data(), 5), "mask"), "fifth item");
}

void invalid() {
  float scores[1] = {};
  std::int64_t counts[1] = {1};
  std::uint8_t mask[1];
  CHECK(refused(cpu::column_mask({scores, nullptr, counts, mask, -1, 1}), "batch"), "");
  CHECK(refused(cpu::column_mask({scores, nullptr, counts, mask, 1, -1}), "columns"), "");
  CHECK(refused(cpu::column_mask({nullptr, nullptr, counts, mask, 1, 1}), "scores"), "");
  CHECK(refused(cpu::column_mask({scores, nullptr, nullptr, mask, 1, 1}), "counts"), "");
  CHECK(refused(cpu::column_mask({scores, nullptr, counts, nullptr, 1, 1}), "mask"), "");
  CHECK(cpu::column_mask({nullptr, nullptr, nullptr, nullptr, 0, 4}).ok(), "empty batch");
}

}  // namespace

int main() {
  for (const std::int64_t columns : {1, 7, 17, 65, 130, 4096}) {
    for (const std::int64_t batch : {1, 5}) {
      compare(batch, columns, false);
      compare(batch, columns, true);
    }
  }
  list();
  invalid();
  return report("column_mask");
}
