#include "check.h"
#include "data.h"
#include "hpa/gram.h"
#include "hpa/inverse_diagonal.h"

using namespace hpa;
using namespace hpa::test;

namespace {

struct Outcome {
  std::vector<float> diagonal, squares;
  std::int32_t minor = 77;
  float pivot = 77, remainder = 77;
};

Outcome run(const ConstMatrix& x, double damping) {
  Outcome out = {std::vector<float>(x.columns + 4, 9), std::vector<float>(x.columns + 4, 9)};
  const Status status = cpu::inverse_diagonal_of_rows(
      x, damping, {out.diagonal.data(), out.squares.data(), &out.minor, &out.pivot, &out.remainder});
  CHECK(status.ok(), status.message);
  for (std::int64_t i = x.columns; i < x.columns + 4; ++i) CHECK(out.diagonal[i] == 9 && out.squares[i] == 9, "guard");
  return out;
}

// diag((X^T X + delta I)^-1) in float64: unblocked Cholesky of the whole matrix, and forward substitution.
std::vector<double> reference(const GuardedMatrix& x, double damping) {
  const auto [data, dtype, tokens, size, stride] = x.view();
  std::vector<double> l(size * size), diagonal(size);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < size; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) l[i * size + j] += x.at(t, i) * x.at(t, j);
    }
  }
  double mean = 0;
  for (std::int64_t j = 0; j < size; ++j) mean += l[j * size + j] / static_cast<double>(size);
  for (std::int64_t i = 0; i < size; ++i) {
    l[i * size + i] += damping * mean;
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = l[i * size + j];
      for (std::int64_t k = 0; k < j; ++k) sum -= l[i * size + k] * l[j * size + k];
      l[i * size + j] = i == j ? std::sqrt(sum) : sum / l[j * size + j];
    }
  }
  for (std::int64_t c = 0; c < size; ++c) {
    std::vector<double> y(size);
    for (std::int64_t i = c; i < size; ++i) {
      double sum = i == c ? 1 : 0;
      for (std::int64_t k = c; k < i; ++k) sum -= l[i * size + k] * y[k];
      y[i] = sum / l[i * size + i];
      diagonal[c] += y[i] * y[i];
    }
  }
  return diagonal;
}

// Features of very different scales, `large` of them massive, a common mean, and one dead feature.
GuardedMatrix rows(std::int64_t tokens, std::int64_t size, std::int64_t large, DType dtype) {
  GuardedMatrix x(tokens, size, dtype);
  Random random(static_cast<unsigned>(tokens * 1000 + size + large));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double common = random.normal();
    for (std::int64_t j = 0; j < size; ++j) {
      const bool massive = large > 0 && j % (size / large) == 3;
      const double scale = massive ? 60 : std::pow(3.0, static_cast<double>(j) / static_cast<double>(size));
      x.set(t, j, j == 5 ? 0 : scale * (random.normal() + 0.5 * common));
    }
  }
  return x;
}

void compare(std::int64_t tokens, std::int64_t size, std::int64_t large, DType dtype, const std::string& set) {
  const std::string context = set + " " + name_of(dtype) + " " + std::to_string(tokens) + "x" + std::to_string(size) +
                              ", massive " + std::to_string(large);
  const GuardedMatrix x = rows(tokens, size, large, dtype), copy = x;
  const std::vector<double> expected = reference(x, 0.01);
  cpu::set_thread_count(1);
  const Outcome out = run(x.view(), 0.01);
  CHECK(x == copy, context);
  CHECK(out.minor == 0 && out.pivot > 0 && out.pivot <= 1, context);
  CHECK(out.remainder > 0 && out.remainder <= 1, context);
  const double bound = 8 * 1.2e-7 / (static_cast<double>(out.pivot) * static_cast<double>(out.remainder));
  CHECK(bound < 1e-3, context + " the massive features do not spoil the bound");
  for (std::int64_t j = 0; j < size; ++j) {
    const double error = std::abs(out.diagonal[j] - expected[j]) / expected[j];
    CHECK(error <= bound && error <= 1e-4, context + " column " + std::to_string(j) + " " + std::to_string(error));
    double squares = 0;
    for (std::int64_t t = 0; t < tokens; ++t) squares += x.at(t, j) * x.at(t, j);
    CHECK(std::abs(out.squares[j] - squares) <= 1e-5 * squares, context + " squares");
  }
  for (const std::int32_t threads : {2, 3}) {
    cpu::set_thread_count(threads);
    CHECK(run(x.view(), 0.01).diagonal == out.diagonal, context + " thread count");
  }
}

void values_that_fail() {
  GuardedMatrix x = rows(7, 60, 0, DType::float32);
  for (const double value : {static_cast<double>(NAN), static_cast<double>(INFINITY), 3e38}) {
    GuardedMatrix bad = x;
    bad.set(3, 11, value);
    const Outcome out = run(bad.view(), 0.01);
    CHECK(out.minor == -1 && std::isnan(out.diagonal[0]), "not finite");
  }
  GuardedMatrix zero(7, 60, DType::float32);
  for (std::int64_t t = 0; t < 7; ++t) {
    for (std::int64_t j = 0; j < 60; ++j) zero.set(t, j, 0);
  }
  CHECK(run(zero.view(), 0.01).minor == 1, "zero");
}

void invalid() {
  float x[4] = {1, 2, 3, 4}, diagonal[2], squares[2], pivot, remainder;
  std::int32_t minor;
  const RowsDiagonalResult good = {diagonal, squares, &minor, &pivot, &remainder};
  const auto call = [&](ConstMatrix m, double damping) { return cpu::inverse_diagonal_of_rows(m, damping, good); };
  const ConstMatrix matrix = {x, DType::float32, 2, 2, 2};
  CHECK(call(matrix, 0.01).ok(), "");
  CHECK(refused(call({x, DType::float32, 0, 2, 2}, 0.01), "tokens"), "");
  CHECK(refused(call({x, DType::float32, 2, 2, 1}, 0.01), "row_stride"), "");
  CHECK(refused(call({nullptr, DType::float32, 2, 2, 2}, 0.01), "x"), "");
  for (const double damping : {0.0, -1.0, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    CHECK(refused(call(matrix, damping), "damping"), "");
  }
  RowsDiagonalResult lacking = good;
  lacking.squares = nullptr;
  CHECK(refused(cpu::inverse_diagonal_of_rows(matrix, 0.01, lacking), "squares"), "");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t tokens : {1, 7, 48, 65}) compare(tokens, 130, 0, dtype, set);
      compare(50, 200, 5, dtype, set);
    }
    compare(100, 800, 50, DType::float32, set);  // more than one panel of massive features
  });
  values_that_fail();
  invalid();
  return report("inverse_diagonal_of_rows");
}
