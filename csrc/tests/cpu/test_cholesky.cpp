#include "check.h"
#include "data.h"
#include "hpa/cholesky.h"

using namespace hpa;
using namespace hpa::test;

namespace {

// A symmetric positive definite matrix whose features differ in scale.
std::vector<float> random_matrix(std::int64_t size, unsigned seed) {
  Random random(seed);
  const std::int64_t tokens = size + 5;
  std::vector<double> x(tokens * size);
  for (std::int64_t i = 0; i < tokens * size; ++i) x[i] = random.normal() * std::pow(10.0, double(i % size) / size);
  std::vector<float> s(size * size);
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; t < tokens; ++t) sum += x[t * size + i] * x[t * size + j];
      s[i * size + j] = s[j * size + i] = static_cast<float>(sum / tokens);
    }
  }
  return s;
}

std::vector<double> damped_diagonal(const std::vector<float>& s, std::int64_t size) {
  std::vector<double> diagonal(size);
  for (std::int64_t j = 0; j < size; ++j) diagonal[j] = s[j * size + j] * 1.05;
  return diagonal;
}

struct Factored {
  std::vector<float> factor;
  std::int32_t minor = 77;
  float pivot = 77;
};

Factored factor(const std::vector<float>& s, const std::vector<double>& diagonal, std::int64_t row_stride = 0) {
  const std::int64_t size = std::ssize(diagonal);
  Factored out;
  out.factor.assign(cpu::cholesky_factor_size(size) + 4, 9.0f);
  const Status status = cpu::cholesky({s.data(), DType::float32, size, size, row_stride > 0 ? row_stride : size},
                                      diagonal.data(), {out.factor.data(), &out.minor, &out.pivot});
  CHECK(status.ok(), status.message);
  for (int i = 1; i <= 4; ++i) CHECK(out.factor[out.factor.size() - i] == 9, "guard");
  return out;
}

std::vector<float> solve(const Factored& factored, const std::vector<float>& rows, std::int64_t count,
                         std::int64_t size, std::int64_t stride) {
  std::vector<float> out(count * stride + 4, 9.0f);
  const Status status = cpu::cholesky_solve(factored.factor.data(), {rows.data(), DType::float32, count, size, stride},
                                            {out.data(), DType::float32, count, size, stride});
  CHECK(status.ok(), status.message);
  for (std::int64_t r = 0; r <= count; ++r) {
    for (std::int64_t j = r < count ? size : 0; j < (r < count ? stride : 4); ++j) {
      CHECK(out[r * stride + j] == 9, "outside of the result");
    }
  }
  return out;
}

// |out S - rows| / |rows|, in float64.
double residual(const std::vector<float>& s, const std::vector<double>& diagonal, const std::vector<float>& rows,
                const std::vector<float>& out, std::int64_t count, std::int64_t stride) {
  const std::int64_t size = std::ssize(diagonal);
  double error = 0, norm = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t j = 0; j < size; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < size; ++k) sum += out[r * stride + k] * (j == k ? diagonal[j] : s[j * size + k]);
      error += std::pow(sum - rows[r * stride + j], 2);
      norm += std::pow(rows[r * stride + j], 2);
    }
  }
  return std::sqrt(error / norm);
}

void compare(std::int64_t size, std::int64_t count, const std::string& set) {
  const std::string context = set + " " + std::to_string(size) + " " + std::to_string(count);
  const std::vector<float> s = random_matrix(size, static_cast<unsigned>(size));
  const std::vector<double> diagonal = damped_diagonal(s, size);
  // The upper triangle is not read, and of the diagonal nothing but whether it is finite.
  const std::int64_t wide = size + 3;
  std::vector<float> lower(size * wide, NAN);
  for (std::int64_t i = 0; i < size; ++i) std::copy_n(&s[i * size], i, &lower[i * wide]);
  for (std::int64_t i = 0; i < size; ++i) lower[i * wide + i] = 0;

  Random random(5);
  const std::int64_t stride = size + 1;
  std::vector<float> rows(count * stride, 1e30f);
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t j = 0; j < size; ++j) rows[r * stride + j] = static_cast<float>(random.normal());
  }
  cpu::set_thread_count(1);
  const Factored one = factor(lower, diagonal, wide);
  CHECK(one.minor == 0 && one.pivot > 0 && one.pivot <= 1, context);
  const std::vector<float> out = solve(one, rows, count, size, stride);
  const double error = residual(s, diagonal, rows, out, count, stride);
  CHECK(error < 2e-5, context + " " + std::to_string(error));
  for (const std::int32_t threads : {2, 3}) {
    cpu::set_thread_count(threads);
    const Factored again = factor(s, diagonal);
    CHECK(again.factor == one.factor && again.pivot == one.pivot, context + " thread count, stride");
    CHECK(solve(again, rows, count, size, stride) == out, context + " thread count");
  }
  std::vector<float> in_place = rows;
  const Status status = cpu::cholesky_solve(one.factor.data(), {in_place.data(), DType::float32, count, size, stride},
                                            {in_place.data(), DType::float32, count, size, stride});
  CHECK(status.ok(), status.message);
  for (std::int64_t i = 0; i < count * stride; ++i) {
    CHECK(in_place[i] == (i % stride < size ? out[i] : rows[i]), context + " in place");
  }
}

void failing_matrices(const std::string& set) {
  const std::int64_t size = 65;
  const std::vector<float> s = random_matrix(size, 3);
  const std::vector<double> diagonal = damped_diagonal(s, size);
  const auto minor_of = [&](std::int64_t i, std::int64_t j, double value) {
    std::vector<float> changed = s;
    std::vector<double> own = diagonal;
    if (i == j) {
      own[i] = value;
    } else {
      changed[i * size + j] = static_cast<float>(value);
    }
    return factor(changed, own).minor;
  };
  CHECK(minor_of(60, 7, NAN) == -1, set);
  CHECK(minor_of(60, 7, INFINITY) == -1, set);
  CHECK(minor_of(33, 33, INFINITY) == -1, set);
  CHECK(minor_of(33, 33, NAN) == -1, set);
  CHECK(minor_of(49, 49, -1) == 50, set);
  CHECK(minor_of(12, 12, 0) == 13, set);
  CHECK(factor(std::vector<float>(9), {0, 0, 0}).minor == 1, set + " zero matrix");
  CHECK(factor({}, {}).minor == 0, set + " size 0");
}

void invalid() {
  float s[4] = {1, 0, 0, 1}, rows[2] = {1, 2}, pivot;
  double diagonal[2] = {1, 1};
  std::int32_t minor;
  std::vector<float> factor(cpu::cholesky_factor_size(2));
  const CholeskyResult out = {factor.data(), &minor, &pivot};
  constexpr DType type = DType::float32;
  CHECK(refused(cpu::cholesky({s, type, 2, 1, 1}, diagonal, out), "s: must be square"), "");
  CHECK(refused(cpu::cholesky({s, DType::bfloat16, 2, 2, 2}, diagonal, out), "s: dtype"), "");
  CHECK(refused(cpu::cholesky({s, type, 2, 2, 1}, diagonal, out), "s: row_stride"), "");
  CHECK(refused(cpu::cholesky({nullptr, type, 2, 2, 2}, diagonal, out), "s: data is null"), "");
  CHECK(refused(cpu::cholesky({s, type, 2, 2, 2}, nullptr, out), "diagonal"), "");
  CHECK(refused(cpu::cholesky({s, type, 2, 2, 2}, diagonal, {nullptr, &minor, &pivot}), "factor"), "");
  CHECK(refused(cpu::cholesky({s, type, 2, 2, 2}, diagonal, {factor.data(), nullptr, &pivot}), "failed_minor"), "");
  CHECK(refused(cpu::cholesky({s, type, 2, 2, 2}, diagonal, {factor.data(), &minor, nullptr}), "smallest_pivot"), "");
  CHECK(refused(cpu::cholesky_solve(nullptr, {rows, type, 1, 2, 2}, {rows, type, 1, 2, 2}), "factor"), "");
  CHECK(refused(cpu::cholesky_solve(factor.data(), {rows, type, 1, 2, 2}, {rows, type, 1, 1, 2}), "out: shape"), "");
  CHECK(refused(cpu::cholesky_solve(factor.data(), {rows, DType::float16, 1, 2, 2}, {rows, DType::float16, 1, 2, 2}),
                "rows: dtype"),
        "");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const std::int64_t size : {1, 2, 7, 47, 48, 49, 130, 193, 389}) {
      for (const std::int64_t count : {1, 5, 48, 100}) compare(size, count, set);
    }
    compare(60, 1200, set);  // more right-hand sides than are in memory at a time
    failing_matrices(set);
  });
  invalid();
  return report("cholesky");
}
