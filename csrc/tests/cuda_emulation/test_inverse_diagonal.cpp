// Emulated inverse_diagonal against a float64 inverse: both precisions, batches, strides, the reported failures.
#include "test_support.h"

using namespace test;

namespace {

using hpa::Precision;

// The diagonal of the inverse of the damped matrix by Gauss-Jordan elimination; empty where a pivot is not positive.
std::vector<double> reference(const float* h, std::int64_t n, std::int64_t stride, double damping) {
  std::vector<double> a(static_cast<std::size_t>(n * n)), inverse(a.size());
  double mean = 0;
  for (std::int64_t j = 0; j < n; ++j) mean += h[j * stride + j] / static_cast<double>(n);
  const auto at = [n](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * n + j); };
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      a[at(i, j)] = i >= j ? h[i * stride + j] : h[j * stride + i];
      inverse[at(i, j)] = i == j;
    }
    a[at(i, i)] += damping * mean;
  }
  for (std::int64_t p = 0; p < n; ++p) {
    const double pivot = a[at(p, p)];
    for (std::int64_t j = 0; j < n; ++j) {
      a[at(p, j)] /= pivot;
      inverse[at(p, j)] /= pivot;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const double factor = a[at(i, p)];
      if (i == p || factor == 0) continue;
      for (std::int64_t j = 0; j < n; ++j) {
        a[at(i, j)] -= factor * a[at(p, j)];
        inverse[at(i, j)] -= factor * inverse[at(p, j)];
      }
    }
  }
  std::vector<double> diagonal(static_cast<std::size_t>(n));
  for (std::int64_t j = 0; j < n; ++j) diagonal[static_cast<std::size_t>(j)] = inverse[at(j, j)];
  return diagonal;
}

// A Gram of `samples` correlated rows; columns differ in scale by up to 1000. The upper triangle holds NaN: not read.
void fill_gram(float* h, std::int64_t n, std::int64_t stride, std::int64_t samples) {
  std::vector<double> x(static_cast<std::size_t>(samples * n));
  for (std::int64_t t = 0; t < samples; ++t) {
    const double common = normal();
    for (std::int64_t j = 0; j < n; ++j) {
      x[static_cast<std::size_t>(t * n + j)] = (common + normal()) * std::pow(10.0, static_cast<double>(j % 4) - 1.5);
    }
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; j <= i && t < samples; ++t) {
        sum += x[static_cast<std::size_t>(t * n + i)] * x[static_cast<std::size_t>(t * n + j)];
      }
      h[i * stride + j] = j <= i ? static_cast<float>(sum * 2 / static_cast<double>(samples)) : NAN;
    }
  }
}

struct Outcome {
  std::vector<float> diagonal, smallest_pivot;
  std::vector<std::int32_t> failed_minor;
};

Outcome call(const float* h, std::int64_t batch, std::int64_t n, std::int64_t batch_stride, std::int64_t stride,
             double damping, Precision precision, int orders) {
  Outcome outcome;
  in_every_order(
      "inverse_diagonal",
      [&](Bytes& bytes) {
        const std::size_t count = static_cast<std::size_t>(batch);
        Guarded diagonal(count * static_cast<std::size_t>(n) * 4), failed(count * 4), pivots(count * 4);
        Guarded workspace(hpa::cuda::inverse_diagonal_workspace_bytes(batch, n, precision));
        const Status status = hpa::cuda::inverse_diagonal(
            {h, batch, n, batch_stride, stride}, damping, precision,
            {diagonal.as<float>(), failed.as<std::int32_t>(), pivots.as<float>()}, workspace.as(), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(diagonal.intact() && failed.intact() && pivots.intact() && workspace.intact(), "guards");
        outcome.diagonal.assign(diagonal.as<float>(), diagonal.as<float>() + batch * n);
        outcome.failed_minor.assign(failed.as<std::int32_t>(), failed.as<std::int32_t>() + batch);
        outcome.smallest_pivot.assign(pivots.as<float>(), pivots.as<float>() + batch);
        append(bytes, diagonal.as(), count * static_cast<std::size_t>(n) * 4);
        append(bytes, failed.as(), count * 4);
        append(bytes, pivots.as(), count * 4);
      },
      orders);
  return outcome;
}

void one(std::int64_t batch, std::int64_t n, std::int64_t gap, double damping, Precision precision, int orders = 3) {
  const std::int64_t stride = n + gap, batch_stride = n * stride + 3;
  std::vector<float> h(static_cast<std::size_t>(batch * batch_stride), NAN);
  for (std::int64_t b = 0; b < batch; ++b) fill_gram(h.data() + b * batch_stride, n, stride, 3 * n + 5);
  const Outcome outcome = call(h.data(), batch, n, batch_stride, stride, damping, precision, orders);
  const double tolerance = precision == Precision::float64 ? 2e-6 : 2e-4;
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::size_t at = static_cast<std::size_t>(b);
    CHECK(outcome.failed_minor[at] == 0, "n %ld: minor %d", n, outcome.failed_minor[at]);
    CHECK(outcome.smallest_pivot[at] > 0 && outcome.smallest_pivot[at] <= 1, "%g", outcome.smallest_pivot[at]);
    const std::vector<double> want = reference(h.data() + b * batch_stride, n, stride, damping);
    for (std::int64_t j = 0; j < n; ++j) {
      const double got = outcome.diagonal[static_cast<std::size_t>(b * n + j)],
                   expected = want[static_cast<std::size_t>(j)];
      CHECK(std::fabs(got - expected) <= tolerance * expected, "n %ld, batch %ld, column %ld: %g for %g", n, b, j, got,
            expected);
    }
  }
}

// Three matrices, the middle one broken by `breaks`; its neighbours must come out as if it were not there.
void failing(std::int64_t n, Precision precision, double damping, std::int32_t minor,
             const std::function<void(float*)>& breaks) {
  std::vector<float> h(static_cast<std::size_t>(3 * n * n));
  for (int b = 0; b < 3; ++b) fill_gram(h.data() + b * n * n, n, n, 2 * n + 3);
  breaks(h.data() + n * n);
  const Outcome outcome = call(h.data(), 3, n, n * n, n, damping, precision, 2);
  CHECK(outcome.failed_minor[0] == 0 && outcome.failed_minor[2] == 0, "neighbours");
  CHECK(outcome.failed_minor[1] == minor, "minor %d for %d", outcome.failed_minor[1], minor);
  CHECK(minor < 0 ? std::isnan(outcome.smallest_pivot[1]) : outcome.smallest_pivot[1] <= 0, "%g",
        outcome.smallest_pivot[1]);
  for (std::int64_t j = 0; j < n; ++j) {
    CHECK(std::isnan(outcome.diagonal[static_cast<std::size_t>(n + j)]), "column %ld is not NaN", j);
    CHECK(
        outcome.diagonal[static_cast<std::size_t>(j)] > 0 && outcome.diagonal[static_cast<std::size_t>(2 * n + j)] > 0,
        "neighbours");
  }
}

}  // namespace

int main() {
  for (Precision precision : {Precision::float32, Precision::float64}) {
    one(1, 1, 0, 0.01, precision);
    one(3, 5, 2, 0.01, precision);
    one(2, 64, 0, 0.0, precision);
    one(1, 127, 1, 0.01, precision, 2);
    one(2, 129, 0, 0.05, precision, 2);
    one(1, 300, 4, 0.01, precision, 2);
    one(0, 5, 0, 0.01, precision);
    const std::int64_t n = 150;
    const auto at = [n](std::int64_t i, std::int64_t j) { return i * n + j; };
    failing(n, precision, 0.01, -1, [&](float* h) { h[at(149, 3)] = NAN; });
    failing(n, precision, 0.01, -1, [&](float* h) { h[at(40, 40)] = INFINITY; });
    failing(n, precision, 0.0, 141, [&](float* h) {
      for (std::int64_t j = 0; j < n; ++j) h[at(std::max<std::int64_t>(j, 140), std::min<std::int64_t>(j, 140))] = 0;
    });
    failing(n, precision, 0.0, 8, [&](float* h) { h[at(7, 7)] = -1; });
    failing(n, precision, 0.0, 132, [&](float* h) { h[at(131, 131)] *= 1e-3f; });
    // A dead column is regular once damped: its diagonal is 1 / delta.
    std::vector<float> h(static_cast<std::size_t>(n * n));
    fill_gram(h.data(), n, n, 2 * n);
    double mean = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      h[static_cast<std::size_t>(at(std::max<std::int64_t>(j, 70), std::min<std::int64_t>(j, 70)))] = 0;
    }
    for (std::int64_t j = 0; j < n; ++j) mean += h[static_cast<std::size_t>(at(j, j))] / static_cast<double>(n);
    const Outcome outcome = call(h.data(), 1, n, n * n, n, 0.01, precision, 1);
    CHECK(outcome.failed_minor[0] == 0, "dead column: minor %d", outcome.failed_minor[0]);
    CHECK(std::fabs(outcome.diagonal[70] * 0.01 * mean - 1) < 1e-5, "dead column: %g", outcome.diagonal[70]);
  }
  {
    std::int32_t failed = 7;
    float pivot = 7;
    CHECK(hpa::cuda::inverse_diagonal({nullptr, 1, 0, 0, 0}, 0.01, Precision::float32, {nullptr, &failed, &pivot},
                                      nullptr, nullptr)
              .ok(),
          "empty");
    CHECK(failed == 0 && pivot == 1, "empty");
  }
  std::vector<float> h(25, 0.0f), diagonal(5);
  for (int j = 0; j < 5; ++j) h[static_cast<std::size_t>(j * 6)] = 2;
  std::int32_t failed;
  float pivot;
  const hpa::MatrixBatch batch{h.data(), 1, 5, 25, 5};
  const hpa::InverseDiagonalResult result{diagonal.data(), &failed, &pivot};
  Guarded workspace(hpa::cuda::inverse_diagonal_workspace_bytes(1, 5, Precision::float32));
  const auto with = [&](hpa::MatrixBatch m, double damping, hpa::InverseDiagonalResult r, void* w,
                        Precision p = Precision::float32) {
    return hpa::cuda::inverse_diagonal(m, damping, p, r, w, nullptr);
  };
  std::vector<float> large(300 * 300, 0.0f), large_diagonal(300);
  for (std::size_t j = 0; j < 300; ++j) large[j * 301] = 2;
  Guarded large_workspace(hpa::cuda::inverse_diagonal_workspace_bytes(1, 300, Precision::float32));
  expect_launch_failures("inverse_diagonal", [&] {
    return with({large.data(), 1, 300, 90000, 300}, 0.01, {large_diagonal.data(), &failed, &pivot},
                large_workspace.as());
  });
  expect_invalid("negative damping", with(batch, -0.1, result, workspace.as()));
  expect_invalid("NaN damping", with(batch, NAN, result, workspace.as()));
  expect_invalid("unknown precision", with(batch, 0.1, result, workspace.as(), static_cast<Precision>(3)));
  expect_invalid("no workspace", with(batch, 0.1, result, nullptr));
  expect_invalid("no diagonal", with(batch, 0.1, {nullptr, &failed, &pivot}, workspace.as()));
  expect_invalid("no flags", with(batch, 0.1, {diagonal.data(), nullptr, &pivot}, workspace.as()));
  expect_invalid("no pivots", with(batch, 0.1, {diagonal.data(), &failed, nullptr}, workspace.as()));
  expect_invalid("short stride", with({h.data(), 1, 5, 25, 4}, 0.1, result, workspace.as()));
  expect_invalid("negative size", with({h.data(), 1, -5, 25, 5}, 0.1, result, workspace.as()));
  expect_invalid("no data", with({nullptr, 1, 5, 25, 5}, 0.1, result, workspace.as()));
  return report("cuda_emulation_inverse_diagonal");
}
