#include "check.h"
#include "data.h"
#include "hpa/gram.h"

using namespace hpa;
using namespace hpa::test;

namespace {

// Adds the float64 Gram of the tokens that count, and the sums of |x_i x_j| that bound the rounding error.
void reference(const GuardedMatrix& x, const std::vector<std::uint8_t>* mask, std::vector<double>& gram,
               std::vector<double>& bound) {
  const auto [data, dtype, tokens, columns, stride] = x.view();
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (mask != nullptr && (*mask)[t] == 0) continue;
    std::vector<double> row(columns);
    for (std::int64_t j = 0; j < columns; ++j) row[j] = x.at(t, j);
    for (std::int64_t i = 0; i < columns; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        gram[i * columns + j] += row[i] * row[j];
        bound[i * columns + j] += std::abs(row[i] * row[j]);
      }
    }
  }
}

void compare(std::int64_t tokens, std::int64_t columns, DType dtype, bool masked, const std::string& set) {
  const std::string context = set + " " + name_of(dtype) + " " + std::to_string(tokens) + "x" + std::to_string(columns);
  Random random(static_cast<unsigned>(tokens * 1000 + columns));
  GuardedMatrix x(tokens, columns, dtype), gram(columns, columns, DType::float32);
  x.fill_normal(random);
  std::vector<std::uint8_t> mask(tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    mask[t] = random.chance(0.6) ? 3 : 0;
    if (masked && mask[t] == 0) {
      for (std::int64_t j = 0; j < columns; ++j) x.set(t, j, j % 2 == 0 ? NAN : INFINITY);
    }
  }
  std::vector<double> expected(columns * columns), bound(columns * columns, 1.0);
  for (std::int64_t i = 0; i < columns; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      gram.set(i, j, 1.0 / (1 + i + j));
      expected[i * columns + j] = gram.at(i, j);
    }
  }
  reference(x, masked ? &mask : nullptr, expected, bound);
  const Matrix view = gram.mutable_view();
  const Status status =
      cpu::gram_accumulate(x.view(), masked ? mask.data() : nullptr, static_cast<float*>(view.data), view.row_stride);
  CHECK(status.ok(), context + status.message);
  CHECK(gram.guards_intact(), context);
  for (std::int64_t i = 0; i < columns; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const double error = std::abs(gram.at(i, j) - expected[i * columns + j]);
      CHECK(error <= 2e-6 * bound[i * columns + j], context);  // the sum of 256 in order, then blocks
      CHECK(gram.bits(i, j) == gram.bits(j, i), context + " symmetric");
    }
  }
}

// Large enough for several tiles, chunks of depth and packing tasks.
void threads_agree(DType dtype, const std::string& set) {
  Random random(5);
  const std::int64_t tokens = 611, columns = 1300;
  GuardedMatrix x(tokens, columns, dtype);
  x.fill_normal(random);
  std::vector<float> first;
  for (const std::int32_t threads : {1, 2, 3}) {
    cpu::set_thread_count(threads);
    std::vector<float> gram(columns * columns);
    CHECK(cpu::gram_accumulate(x.view(), nullptr, gram.data(), columns).ok(), set);
    if (threads == 1) first = gram;
    CHECK(std::memcmp(first.data(), gram.data(), gram.size() * sizeof(float)) == 0, set + " thread count");
  }
  double worst = 0;
  for (const auto& [i, j] : {std::pair{0, 0}, {1299, 1299}, {1299, 3}, {700, 650}, {48, 47}}) {
    double sum = 0;
    for (std::int64_t t = 0; t < tokens; ++t) sum += x.at(t, i) * x.at(t, j);
    worst = std::max(worst, std::abs(first[i * columns + j] - sum) / tokens);
  }
  CHECK(worst < 1e-6, set);
}

// More tokens than are packed at once; small integers, so that every sum is exact.
void many_tokens() {
  const std::int64_t tokens = 13001, columns = 1300;
  const auto value = [](std::int64_t t, std::int64_t j) {
    return static_cast<int>((t * 7 + j * 3 + t * j % 11) % 5) - 2;
  };
  std::vector<float> x(tokens * columns), gram(columns * columns);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < columns; ++j) x[t * columns + j] = static_cast<float>(value(t, j));
  }
  CHECK(cpu::gram_accumulate({x.data(), DType::float32, tokens, columns, columns}, nullptr, gram.data(), columns).ok(),
        "");
  for (const auto& [i, j] : {std::pair{0, 0}, {1299, 1299}, {1299, 3}, {3, 1299}, {700, 650}, {48, 47}}) {
    std::int64_t sum = 0;
    for (std::int64_t t = 0; t < tokens; ++t) sum += value(t, i) * value(t, j);
    CHECK(gram[i * columns + j] == static_cast<float>(sum), "many tokens");
  }
}

void invalid() {
  float gram[4] = {}, x[4] = {};
  const ConstMatrix good = {x, DType::float32, 2, 2, 2};
  const auto call = [&](ConstMatrix m, float* g, std::int64_t stride) {
    return cpu::gram_accumulate(m, nullptr, g, stride);
  };
  CHECK(refused(call({x, static_cast<DType>(9), 2, 2, 2}, gram, 2), "dtype"), "");
  CHECK(refused(call({x, DType::float32, -1, 2, 2}, gram, 2), "rows"), "");
  CHECK(refused(call({x, DType::float32, 2, 2, 1}, gram, 2), "row_stride"), "");
  CHECK(refused(call({nullptr, DType::float32, 2, 2, 2}, gram, 2), "x"), "");
  CHECK(refused(call(good, nullptr, 2), "gram"), "");
  CHECK(refused(call(good, gram, 1), "gram_stride"), "");
  CHECK(call({nullptr, DType::float32, 0, 2, 2}, gram, 2).ok(), "no tokens");
  CHECK(call({nullptr, DType::float32, 3, 0, 0}, nullptr, 0).ok(), "no columns");
  const std::uint8_t none[2] = {0, 0};
  CHECK(cpu::gram_accumulate(good, none, gram, 2).ok() && gram[0] == 0, "all masked");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t columns : {1, 7, 17, 65, 130}) {
        for (const std::int64_t tokens : {0, 1, 7, 130, 517})
          compare(tokens, columns, dtype, (tokens + columns) % 3 == 0, set);
      }
      threads_agree(dtype, set);
    }
  });
  many_tokens();
  invalid();
  return report("gram");
}
