#include "check.h"
#include "data.h"
#include "hpa/inverse_diagonal.h"

using namespace hpa;
using namespace hpa::test;

namespace {

constexpr Precision kPrecisions[] = {Precision::float32, Precision::float64};

// X^T X of `tokens` random tokens whose columns have scales over a wide range.
std::vector<float> random_gram(std::int64_t size, std::int64_t tokens, unsigned seed, double range) {
  Random random(seed);
  std::vector<double> x(tokens * size);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double common = random.normal();
    for (std::int64_t j = 0; j < size; ++j)
      x[t * size + j] = (random.normal() + common) * std::pow(range, double(j) / size);
  }
  std::vector<float> h(size * size);
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; t < tokens; ++t) sum += x[t * size + i] * x[t * size + j];
      h[i * size + j] = h[j * size + i] = static_cast<float>(sum / tokens);
    }
  }
  return h;
}

// diag((H + delta I)^-1) by an unblocked float64 Cholesky factorization.
std::vector<double> reference(const std::vector<float>& h, std::int64_t size, double damping) {
  std::vector<double> l(size * size), diagonal(size);
  double mean = 0;
  for (std::int64_t j = 0; j < size; ++j) mean += h[j * size + j] / double(size);
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = h[i * size + j] + (i == j ? damping * mean : 0);
      for (std::int64_t k = 0; k < j; ++k) sum -= l[i * size + k] * l[j * size + k];
      l[i * size + j] = i == j ? std::sqrt(sum) : sum / l[j * size + j];
    }
  }
  for (std::int64_t c = 0; c < size; ++c) {
    std::vector<double> y(size);
    for (std::int64_t i = c; i < size; ++i) {
      double sum = i == c;
      for (std::int64_t k = c; k < i; ++k) sum -= l[i * size + k] * y[k];
      y[i] = sum / l[i * size + i];
      diagonal[c] += y[i] * y[i];
    }
  }
  return diagonal;
}

struct Outcome {
  std::vector<float> diagonal;
  std::vector<std::int32_t> minor;
  std::vector<float> pivot;
};

Outcome run(const std::vector<float>& h, std::int64_t batch, std::int64_t size, double damping, Precision precision,
            std::int64_t row_stride = 0) {
  if (row_stride == 0) row_stride = size;
  Outcome out = {std::vector<float>(batch * size + 4, 9), std::vector<std::int32_t>(batch, 77),
                 std::vector<float>(batch, 77)};
  const std::vector<float> copy = h;
  const Status status = cpu::inverse_diagonal({h.data(), batch, size, size * row_stride, row_stride}, damping,
                                              precision, {out.diagonal.data(), out.minor.data(), out.pivot.data()});
  CHECK(status.ok(), status.message);
  CHECK(std::memcmp(copy.data(), h.data(), h.size() * sizeof(float)) == 0, "H unchanged");
  for (int i = 0; i < 4; ++i) CHECK(out.diagonal[batch * size + i] == 9, "guard");
  return out;
}

void compare(std::int64_t size, const std::string& set) {
  const double damping = 0.01;
  const std::vector<float> h = random_gram(size, 2 * size + 3, static_cast<unsigned>(size), 10);
  const std::vector<double> expected = reference(h, size, damping);
  // The upper triangle is not read.
  std::vector<float> lower = h;
  for (std::int64_t i = 0; i < size; ++i) {
    for (std::int64_t j = i + 1; j < size; ++j) lower[i * size + j] = NAN;
  }
  std::vector<float> wide(size * (size + 3), NAN);
  for (std::int64_t i = 0; i < size; ++i) std::copy_n(&lower[i * size], size, &wide[i * (size + 3)]);
  for (const Precision precision : kPrecisions) {
    const std::string context =
        set + " " + std::to_string(size) + (precision == Precision::float32 ? " float32" : " float64");
    cpu::set_thread_count(1);
    const Outcome out = run(lower, 1, size, damping, precision);
    CHECK(out.minor[0] == 0 && out.pivot[0] > 0 && out.pivot[0] <= 1, context);
    for (std::int64_t j = 0; j < size; ++j) {
      const double error = std::abs(out.diagonal[j] - expected[j]) / expected[j];
      CHECK(error <= (precision == Precision::float32 ? 2e-5 : 1e-7), context + " " + std::to_string(error));
    }
    for (const std::int32_t threads : {2, 3}) {
      cpu::set_thread_count(threads);
      CHECK(run(wide, 1, size, damping, precision, size + 3).diagonal == out.diagonal,
            context + " thread count, stride");
    }
  }
}

void failures_stay_apart(const std::string& set) {
  const std::int64_t size = 65, batch = 6;
  const std::vector<float> one = random_gram(size, 200, 3, 1);
  std::vector<float> h;
  for (std::int64_t b = 0; b < batch; ++b) h.insert(h.end(), one.begin(), one.end());
  const auto at = [&](std::int64_t b, std::int64_t i, std::int64_t j) -> float& {
    return h[(b * size + i) * size + j];
  };
  at(1, 60, 7) = NAN;
  at(2, 33, 33) = INFINITY;
  at(3, 49, 49) = -1;  // minor 50 at the latest
  for (std::int64_t j = 0; j <= 20; ++j) at(4, 20, j) = at(4, 19, std::min<std::int64_t>(j, 19));
  at(4, 20, 20) = at(4, 19, 19) * 0.5f;  // row 20 repeats row 19, and less
  for (const Precision precision : kPrecisions) {
    for (const std::int32_t threads : {1, 2}) {
      cpu::set_thread_count(threads);
      const Outcome alone = run(one, 1, size, 0, precision), out = run(h, batch, size, 0, precision);
      const std::int32_t expected[] = {0, -1, -1, 50, 21, 0};
      for (std::int64_t b = 0; b < batch; ++b) {
        const std::string context = set + " matrix " + std::to_string(b) + " minor " + std::to_string(out.minor[b]);
        CHECK(out.minor[b] == expected[b], context);
        for (std::int64_t j = 0; j < size; ++j) {
          const float value = out.diagonal[b * size + j];
          CHECK(expected[b] == 0 ? value == alone.diagonal[j] : std::isnan(value), context);
        }
      }
      CHECK(out.pivot[0] == alone.pivot[0] && std::isnan(out.pivot[1]) && out.pivot[3] <= 0 && out.pivot[4] <= 0, set);
    }
  }
}

void special(const std::string& set) {
  for (const Precision precision : kPrecisions) {
    const std::vector<float> zero(9);
    CHECK(run(zero, 1, 3, 0, precision).minor[0] == 1, set + " zero matrix");
    CHECK(run(zero, 1, 3, 0.5, precision).minor[0] == 1, set + " zero matrix, damped by zero");
    const std::vector<float> dead = {4, 0, 0, 0};
    CHECK(run(dead, 1, 2, 0, precision).minor[0] == 2, set + " dead column");
    const Outcome damped = run(dead, 1, 2, 0.5, precision);
    CHECK(damped.minor[0] == 0 && std::abs(damped.diagonal[0] - 0.2f) < 1e-6 && std::abs(damped.diagonal[1] - 1) < 1e-6,
          set);
    const std::vector<float> tiny = {1e-30f, 0, 0, 1e30f};
    const Outcome scaled = run(tiny, 1, 2, 0, precision);
    CHECK(scaled.minor[0] == 0 && std::abs(scaled.diagonal[0] - 1e30f) < 1e24f && scaled.pivot[0] == 1, set);
    CHECK(run({}, 3, 0, 0.01, precision).minor[2] == 0, "size 0");
  }
}

void invalid() {
  float h[4] = {1, 0, 0, 1}, diagonal[2], pivot[1];
  std::int32_t minor[1];
  const InverseDiagonalResult out = {diagonal, minor, pivot};
  const auto call = [&](MatrixBatch m, double damping, InverseDiagonalResult r) {
    return cpu::inverse_diagonal(m, damping, Precision::float32, r);
  };
  CHECK(refused(call({h, -1, 2, 4, 2}, 0, out), "batch"), "");
  CHECK(refused(call({h, 1, -2, 4, 2}, 0, out), "size"), "");
  CHECK(refused(call({h, 1, 2, 4, 1}, 0, out), "row_stride"), "");
  CHECK(refused(call({nullptr, 1, 2, 4, 2}, 0, out), "h:"), "");
  CHECK(refused(call({h, 1, 2, 4, 2}, -1, out), "damping"), "");
  CHECK(refused(call({h, 1, 2, 4, 2}, NAN, out), "damping"), "");
  CHECK(refused(call({h, 1, 2, 4, 2}, 0, {nullptr, minor, pivot}), "diagonal"), "");
  CHECK(refused(call({h, 1, 2, 4, 2}, 0, {diagonal, nullptr, pivot}), "failed_minor"), "");
  CHECK(refused(call({h, 1, 2, 4, 2}, 0, {diagonal, minor, nullptr}), "smallest_pivot"), "");
  CHECK(refused(cpu::inverse_diagonal({h, 1, 2, 4, 2}, 0, static_cast<Precision>(3), out), "precision"), "");
}

}  // namespace

int main() {
  for_each_instruction_set([](const std::string& set) {
    for (const std::int64_t size : {1, 7, 17, 48, 65, 130, 389}) compare(size, set);
    failures_stay_apart(set);
    special(set);
  });
  invalid();
  return report("inverse_diagonal");
}
