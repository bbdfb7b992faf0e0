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

void invalid() {
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
  });
  invalid();
  return report("column_scores");
}
