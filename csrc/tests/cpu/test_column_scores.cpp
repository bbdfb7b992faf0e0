#include "check.h"
#include "data.h"
#include "hpa/column_scores.h"

using namespace hpa;
using namespace hpa::test;

namespace {

struct Result {
  std::vector<float> squared;
  float inner = NAN, norm = NAN;
  bool operator==(const Result& other) const {
    return squared == other.squared && inner == other.inner && norm == other.norm;
  }
};

Result run(const GuardedMatrix& before, const GuardedMatrix& after, const std::string& context) {
  const std::int64_t columns = before.view().columns;
  Result result;
  result.squared.assign(columns + 8, -7.0f);
  const Status status =
      cpu::column_scores(before.view(), after.view(), {result.squared.data(), &result.inner, &result.norm});
  CHECK(status.ok(), context + status.message);
  for (std::int64_t j = columns; j < columns + 8; ++j) CHECK(result.squared[j] == -7.0f, context + " guard");
  return result;
}

void compare(std::int64_t rows, std::int64_t columns, DType dtype, const std::string& set) {
  const std::string context = set + " " + name_of(dtype) + " " + std::to_string(rows) + "x" + std::to_string(columns);
  Random random(static_cast<unsigned>(rows * 77 + columns));
  GuardedMatrix before(rows, columns, dtype, 5), after(rows, columns, dtype, 9, 1);
  before.fill_normal(random);
  after.fill_normal(random);
  cpu::set_thread_count(1);
  const Result result = run(before, after, context);
  for (const std::int32_t threads : {2, 3}) {
    cpu::set_thread_count(threads);
    CHECK(result == run(before, after, context), context + " thread count");
  }
  double inner = 0, norm = 0, bound = 0;
  for (std::int64_t j = 0; j < columns; ++j) {
    double squared = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      const double old = before.at(i, j), update = after.at(i, j) - old;
      squared += update * update;
      inner += update * old;
      norm += old * old;
      bound += std::abs(update * old);
    }
    CHECK(std::abs(result.squared[j] - squared) <= 2e-6 * squared, context);
  }
  CHECK(std::abs(result.inner - inner) <= 2e-6 * bound, context);
  CHECK(std::abs(result.norm - norm) <= 2e-6 * norm, context);
}

// Layers of all kinds in one list, large partial sums among them: each gets the bits it gets alone.
void list(const std::string& set) {
  struct Layer {
    GuardedMatrix before, after;
    Result result;
  };
  const std::int64_t shapes[][2] = {{3, 7}, {0, 5}, {130, 4099}, {5, 0}, {389, 17}, {1, 1}};
  std::vector<Layer> layers;
  Random random(3);
  for (int i = 0; i < 40; ++i) {
    const auto [rows, columns] = shapes[i % 6];
    const DType dtype = kDTypes[i / 2 % 3];
    layers.push_back({GuardedMatrix(rows, columns, dtype, i % 4), GuardedMatrix(rows, columns, dtype, 3, i % 5), {}});
    layers.back().before.fill_normal(random);
    layers.back().after.fill_normal(random);
  }
  // One row of partial sums fills the scratch memory of 32 MiB by itself, so that several batches follow.
  layers.push_back(
      {GuardedMatrix(1, (9 << 20) + 3, DType::bfloat16, 0), GuardedMatrix(1, (9 << 20) + 3, DType::bfloat16, 0), {}});
  layers.push_back({GuardedMatrix(9, 100, DType::float32, 0), GuardedMatrix(9, 100, DType::float32, 0), {}});
  for (const std::int32_t threads : {1, 3}) {
    cpu::set_thread_count(threads);
    std::vector<ColumnScoresItem> items;
    for (Layer& layer : layers) {
      layer.result.squared.assign(layer.before.view().columns + 8, -7.0f);
      items.push_back({layer.before.view(),
                       layer.after.view(),
                       {layer.result.squared.data(), &layer.result.inner, &layer.result.norm}});
    }
    CHECK(cpu::column_scores_list(items.data(), std::ssize(items)).ok(), set);
    for (Layer& layer : layers) CHECK(layer.result == run(layer.before, layer.after, set), set + " list as alone");
  }
}

void invalid() {
  CHECK(cpu::column_scores_list(nullptr, 0).ok(), "empty list");
  CHECK(refused(cpu::column_scores_list(nullptr, 1), "items"), "no items");
  CHECK(refused(cpu::column_scores_list(nullptr, -1), "count"), "negative count");
  {
    float value = 1, squared = 5, inner = 5, norm = 5;
    const ConstMatrix one = {&value, DType::float32, 1, 1, 1};
    const ColumnScoresItem items[] = {{one, one, {&squared, &inner, &norm}}, {one, one, {&squared, nullptr, &norm}}};
    CHECK(refused(cpu::column_scores_list(items, 2), "inner_product"), "second item");
    CHECK(squared == 5 && inner == 5 && norm == 5, "nothing is written before all items are checked");
  }
  float data[4] = {}, squared[2], inner = 1, norm = 1;
  const ConstMatrix good = {data, DType::float32, 2, 2, 2};
  const ColumnScores out = {squared, &inner, &norm};
  const auto call = [&](ConstMatrix a, ConstMatrix b, ColumnScores c) { return cpu::column_scores(a, b, c); };
  CHECK(refused(call(good, {data, DType::float16, 2, 2, 2}, out), "w_new"), "dtype");
  CHECK(refused(call(good, {data, DType::float32, 2, 1, 2}, out), "w_new"), "shape");
  CHECK(refused(call({nullptr, DType::float32, 2, 2, 2}, good, out), "w_old"), "null");
  CHECK(refused(call({data, DType::float32, 2, -2, 2}, good, out), "w_old"), "negative");
  CHECK(refused(call(good, good, {nullptr, &inner, &norm}), "squared_update"), "");
  CHECK(refused(call(good, good, {squared, nullptr, &norm}), "inner_product"), "");
  CHECK(refused(call(good, good, {squared, &inner, nullptr}), "old_squared_norm"), "");
  const ConstMatrix no_rows = {nullptr, DType::bfloat16, 0, 2, 2};
  squared[0] = squared[1] = 5;
  CHECK(call(no_rows, no_rows, out).ok() && squared[0] == 0 && squared[1] == 0 && inner == 0 && norm == 0, "no rows");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t columns : {1, 7, 17, 65, 130}) {
        for (const std::int64_t rows : {1, 3, 130, 389}) compare(rows, columns, dtype, set);
      }
      compare(260, 4099, dtype, set);  // two blocks of columns
    }
    list(set);
  });
  invalid();
  return report("column_scores");
}
