#include <algorithm>

#include "check.h"
#include "data.h"
#include "hpa/project_merge.h"

using namespace hpa;
using namespace hpa::test;

namespace {

enum class Output { separate, is_old, is_new };

void compare(std::int64_t rows, std::int64_t columns, DType dtype, MaskAxis axis, Output where,
             const std::string& set) {
  const std::string context = set + " " + name_of(dtype) + " " + std::to_string(rows) + "x" + std::to_string(columns) +
                              (axis == MaskAxis::input ? " input " : " output ") +
                              std::to_string(static_cast<int>(where));
  Random random(static_cast<unsigned>(rows * 77 + columns));
  GuardedMatrix before(rows, columns, dtype, 5), after(rows, columns, dtype, 2, 7),
      separate(rows, columns, dtype, 3, 1);
  before.fill_normal(random);
  after.fill_normal(random);
  before.set_bits(0, 0,
                  dtype == DType::float32   ? 0x7f812345u
                  : dtype == DType::float16 ? 0x7d23u
                                            : 0x7f91u);  // a signalling NaN
  const std::int64_t length = axis == MaskAxis::input ? columns : rows;
  std::vector<std::uint8_t> mask(length);
  for (auto& keep : mask) keep = random.chance(0.4) ? 255 : 0;
  mask[0] = 1;  // the NaN is retained bit by bit
  const float coefficient = 0.37f;
  const GuardedMatrix old_copy = before, new_copy = after;
  GuardedMatrix& out = where == Output::is_old ? before : where == Output::is_new ? after : separate;
  const Status status =
      cpu::project_merge(before.view(), after.view(), mask.data(), axis, &coefficient, out.mutable_view());
  CHECK(status.ok(), context + status.message);
  CHECK(out.guards_intact(), context);
  if (where == Output::separate) CHECK(before == old_copy && after == new_copy, context + " inputs untouched");
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      if (mask[axis == MaskAxis::input ? j : i] != 0) {
        CHECK(out.bits(i, j) == old_copy.bits(i, j), context + " retained");
        continue;
      }
      // Each operation rounded to float32, as torch evaluates the expression.
      const float old = static_cast<float>(old_copy.at(i, j)), product = coefficient * old;
      const float exact = static_cast<float>(new_copy.at(i, j)) - product;
      CHECK(out.bits(i, j) == encode(exact, dtype), context);
    }
  }
}

// Several tasks: the thread count changes nothing, nor does writing in place.
void large(DType dtype, const std::string& set) {
  const std::int64_t rows = 31, columns = 20000;
  Random random(2);
  GuardedMatrix before(rows, columns, dtype, 1), after(rows, columns, dtype, 0), first(rows, columns, dtype, 1);
  before.fill_normal(random);
  after.fill_normal(random);
  std::vector<std::uint8_t> mask(columns);
  for (auto& keep : mask) keep = random.chance(0.4) ? 1 : 0;
  const float coefficient = -0.2f;
  for (const std::int32_t threads : {1, 2, 3}) {
    cpu::set_thread_count(threads);
    GuardedMatrix out(rows, columns, dtype, 1);
    CHECK(
        cpu::project_merge(before.view(), after.view(), mask.data(), MaskAxis::input, &coefficient, out.mutable_view())
            .ok(),
        set);
    CHECK(out.guards_intact(), set);
    if (threads == 1) first = out;
    CHECK(out == first, set + " thread count");
  }
  const Matrix target = before.mutable_view();
  CHECK(cpu::project_merge(before.view(), after.view(), mask.data(), MaskAxis::input, &coefficient, target).ok(), set);
  bool same = true;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) same = same && before.bits(i, j) == first.bits(i, j);
  }
  CHECK(same, set + " in place as apart");
}

// Layers of all kinds in one list, in place or not: each gets the bits it gets alone.
void list(const std::string& set) {
  const std::int64_t shapes[][2] = {{3, 7}, {0, 5}, {130, 2051}, {5, 0}, {65, 17}, {1, 1}};
  std::vector<GuardedMatrix> before, after, apart, expected;
  std::vector<std::vector<std::uint8_t>> masks;
  std::vector<float> coefficients;
  Random random(3);
  for (int i = 0; i < 40; ++i) {
    const auto [rows, columns] = shapes[i % 6];
    const DType dtype = kDTypes[i / 2 % 3];
    before.emplace_back(rows, columns, dtype, i % 4), after.emplace_back(rows, columns, dtype, 3, i % 5);
    apart.emplace_back(rows, columns, dtype, 2, 1), expected.emplace_back(rows, columns, dtype, 0);
    before.back().fill_normal(random);
    after.back().fill_normal(random);
    masks.emplace_back(std::max(rows, columns));
    for (auto& keep : masks.back()) keep = random.chance(0.4) ? 255 : 0;
    coefficients.push_back(static_cast<float>(random.normal()));
  }
  const auto axis_of = [](int i) { return i % 5 < 2 ? MaskAxis::output : MaskAxis::input; };
  const auto out_of = [&](int i) -> GuardedMatrix& {
    return i % 3 == 0 ? before[i] : i % 3 == 1 ? after[i] : apart[i];
  };
  for (int i = 0; i < 40; ++i) {
    CHECK(cpu::project_merge(before[i].view(), after[i].view(), masks[i].data(), axis_of(i), &coefficients[i],
                             expected[i].mutable_view())
              .ok(),
          set);
  }
  std::vector<ProjectMergeItem> items;
  for (int i = 0; i < 40; ++i) {
    items.push_back(
        {before[i].view(), after[i].view(), masks[i].data(), axis_of(i), &coefficients[i], out_of(i).mutable_view()});
  }
  cpu::set_thread_count(2);
  CHECK(cpu::project_merge_list(items.data(), std::ssize(items)).ok(), set);
  for (int i = 0; i < 40; ++i) {
    bool same = true;
    for (std::int64_t row = 0; row < items[i].out.rows; ++row) {
      for (std::int64_t j = 0; j < items[i].out.columns; ++j) {
        same = same && out_of(i).bits(row, j) == expected[i].bits(row, j);
      }
    }
    CHECK(same, set + " list, item " + std::to_string(i));
    CHECK(before[i].guards_intact() && after[i].guards_intact() && apart[i].guards_intact(), set);
  }
  CHECK(cpu::project_merge_list(nullptr, 0).ok(), "empty list");
  CHECK(refused(cpu::project_merge_list(nullptr, 1), "items"), "no items");
  items[2].mask = nullptr;
  const GuardedMatrix untouched = before[0];
  CHECK(refused(cpu::project_merge_list(items.data(), 3), "mask"), "third item");
  CHECK(before[0] == untouched, "nothing is written before all items are checked");
}

// More than the 16 MiB that are written through the caches: the same bits, in place or not, wherever lines begin.
void streamed(DType dtype, const std::string& set) {
  const std::int64_t columns = 4099, element = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t rows = ((std::int64_t{17} << 20) / element + columns - 1) / columns;
  const std::int64_t count = rows * columns, guard = 64;
  std::vector<std::uint8_t> before(count * element), after(count * element), expected(count * element), mask(columns);
  std::uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (auto* bytes : {&before, &after}) {
    for (std::uint8_t& byte : *bytes) byte = static_cast<std::uint8_t>(next());  // numbers of all kinds, NaN too
  }
  for (auto& keep : mask) keep = next() % 3 == 0;
  const float coefficient = 0.37f;
  const auto merge = [&](const void* w_old, const void* w_new, void* out, std::int64_t first, std::int64_t last) {
    const auto at = [&](const void* data) {
      return static_cast<const std::uint8_t*>(data) + first * columns * element;
    };
    return cpu::project_merge({at(w_old), dtype, last - first, columns, columns},
                              {at(w_new), dtype, last - first, columns, columns}, mask.data(), MaskAxis::input,
                              &coefficient,
                              {const_cast<std::uint8_t*>(at(out)), dtype, last - first, columns, columns});
  };
  // Row by row nothing is streamed.
  for (std::int64_t row = 0; row < rows; row += 100) {
    CHECK(merge(before.data(), after.data(), expected.data(), row, std::min(rows, row + 100)).ok(), set);
  }
  std::vector<std::uint8_t> memory(count * element + 64 + 2 * guard);
  for (const std::int64_t offset : {std::int64_t{0}, element, 7 * element}) {
    std::fill(memory.begin(), memory.end(), std::uint8_t{0xa5});
    std::uint8_t* out = memory.data() + guard;
    out += 64 - reinterpret_cast<std::uintptr_t>(out) % 64 + offset - (offset > 0 ? 64 : 0);
    CHECK(merge(before.data(), after.data(), out, 0, rows).ok(), set);
    const std::string context = set + " " + name_of(dtype) + " streamed " + std::to_string(offset);
    CHECK(std::memcmp(out, expected.data(), expected.size()) == 0, context);
    const auto sentinel = [](std::uint8_t byte) { return byte == 0xa5; };
    CHECK(std::all_of(memory.data(), out, sentinel), context + " guard before");
    CHECK(std::all_of(out + expected.size(), memory.data() + memory.size(), sentinel), context + " guard behind");
  }
  std::vector<std::uint8_t> in_place = after;
  CHECK(merge(before.data(), in_place.data(), in_place.data(), 0, rows).ok(), set);
  CHECK(in_place == expected, set + " " + name_of(dtype) + " streamed in place");
}

void invalid() {
  float data[4] = {}, other[4] = {}, coefficient = 1;
  const std::uint8_t mask[2] = {};
  const ConstMatrix good = {data, DType::float32, 2, 2, 2};
  const Matrix out = {other, DType::float32, 2, 2, 2};
  const auto call = [&](ConstMatrix a, ConstMatrix b, const std::uint8_t* m, const float* c, Matrix o) {
    return cpu::project_merge(a, b, m, MaskAxis::input, c, o);
  };
  CHECK(refused(call({data, DType::float32, 2, 2, 1}, good, mask, &coefficient, out), "w_old"), "");
  CHECK(refused(call(good, {data, DType::float16, 2, 2, 2}, mask, &coefficient, out), "w_new"), "");
  CHECK(refused(call(good, good, nullptr, &coefficient, out), "mask"), "");
  CHECK(refused(call(good, good, mask, nullptr, out), "coefficient"), "");
  CHECK(refused(call(good, good, mask, &coefficient, {nullptr, DType::float32, 2, 2, 2}), "out"), "");
  CHECK(refused(call(good, good, mask, &coefficient, {other, DType::float32, 1, 2, 2}), "out"), "");
  CHECK(refused(call(good, good, mask, &coefficient, {data, DType::float32, 2, 2, 3}), "out"), "");
  CHECK(refused(cpu::project_merge(good, good, mask, static_cast<MaskAxis>(4), &coefficient, out), "axis"), "");
  CHECK(call({nullptr, DType::float32, 0, 2, 2}, {nullptr, DType::float32, 0, 2, 2}, nullptr, nullptr,
             {nullptr, DType::float32, 0, 2, 2})
            .ok(),
        "empty");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t columns : {1, 7, 17, 65, 130}) {
        for (const std::int64_t rows : {1, 9, 65}) {
          for (const MaskAxis axis : {MaskAxis::input, MaskAxis::output}) {
            for (const Output where : {Output::separate, Output::is_old, Output::is_new}) {
              compare(rows, columns, dtype, axis, where, set);
            }
          }
        }
      }
      large(dtype, set);
      streamed(dtype, set);
    }
    list(set);
  });
  invalid();
  return report("project_merge");
}
