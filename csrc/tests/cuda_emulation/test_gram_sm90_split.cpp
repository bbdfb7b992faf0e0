// Emulated gram of float32 x by wgmma, as three bfloat16 parts: all six products to the last digit, errors against
// float64 over several flushes and chunks, values that are not finite or nearly not. The emulator rounds each sum of 16
// products once where tensor cores truncate: what these errors do not contain is in docs/kernels.md.
#include "cuda/gram_sm90_split.cuh"
#include "test_support.h"

using namespace test;
using hpa::cuda::GramKernel;

namespace {

constexpr GramKernel kKernel = GramKernel::wgmma;

std::vector<float> gram_of(GuardedMatrix& x, const std::vector<std::uint8_t>& mask = {}) {
  const auto in = static_cast<std::size_t>(x.columns());
  std::vector<float> gram(in * in);
  const std::size_t bytes = hpa::cuda::gram_workspace_bytes(x.view(), kKernel);
  Guarded workspace(bytes);
  std::memset(workspace.as(), 0xff, bytes);
  const Status status = hpa::cuda::gram_accumulate(x.view(), mask.empty() ? nullptr : mask.data(), gram.data(),
                                                   x.columns(), workspace.as(), nullptr, kKernel);
  CHECK(status.ok() && workspace.intact() && x.intact(), "%s", status.message);
  return gram;
}

// The parts are exact, so that one token's products miss only those left out, of 2^-25 at most, and the rounding of six
// sums. Any of the six would be missed: the smallest are up to 2^-17, and some here come near that.
void products_of_one_token() {
  for (double scale : {1.0, 1e-12, 1e15}) {
    for (int repeat = 0; repeat < 8; ++repeat) {
      GuardedMatrix x(DType::float32, 1, 131, 131);
      x.fill_normal(scale);
      const std::vector<float> gram = gram_of(x);
      double worst = 0;
      for (std::int64_t i = 0; i < 131; ++i) {
        for (std::int64_t j = 0; j < 131; ++j) {
          const double want = x.value(0, i) * x.value(0, j);
          worst = std::max(worst, std::fabs(gram[static_cast<std::size_t>(i * 131 + j)] - want) / std::fabs(want));
        }
      }
      CHECK(worst < 2e-7, "scale %g: relative error %g in one token", scale, worst);
    }
  }
}

void parts_are_exact() {
  for (int i = 0; i < 200000; ++i) {
    const double exponent = static_cast<double>(below(236)) - 109;
    float x = static_cast<float>(std::ldexp(1 + std::uniform_real_distribution<double>()(generator()), exponent));
    if (i % 2 == 1) x = -x;
    if (i == 0) x = std::numeric_limits<float>::max();
    if (i == 1) x = -std::numeric_limits<float>::max();
    float parts[3];
    hpa::cuda::sm90::split(x, parts);
    double sum = 0;
    for (float part : parts) {
      std::uint32_t bits;
      std::memcpy(&bits, &part, 4);
      CHECK((bits & 0xffffu) == 0 && std::isfinite(part), "%g: %g is not a finite bfloat16", x, part);
      sum += part;
    }
    CHECK(sum == x, "%.9g became %.9g", x, sum);
  }
}

// Several chunks (256 tokens here), flushes (128) and, where tiles are few, splits; means far from zero, so that sums
// grow.
void long_sums() {
  struct Case {
    std::int64_t tokens, in;
    double mean;
  };
  for (const Case& c :
       {Case{700, 136, 0.0}, Case{1025, 67, 3.0}, Case{5000, 24, 1.0}, Case{1700, 24, 0.0}, Case{257, 264, -20.0}}) {
    GuardedMatrix x(DType::float32, c.tokens, c.in, c.in + 3);
    std::vector<std::uint8_t> mask;
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      mask.push_back(below(5) != 0);
      for (std::int64_t j = 0; j < c.in; ++j) x.set(t, j, mask.back() != 0 ? c.mean + normal() : NAN);
    }
    const std::vector<float> gram = gram_of(x, mask);
    double error = 0, size = 0;
    for (std::int64_t i = 0; i < c.in; ++i) {
      for (std::int64_t j = 0; j < c.in; ++j) {
        double want = 0;
        for (std::int64_t t = 0; t < c.tokens; ++t) {
          if (mask[static_cast<std::size_t>(t)] != 0) want += x.value(t, i) * x.value(t, j);
        }
        const double miss = gram[static_cast<std::size_t>(i * c.in + j)] - want;
        error += miss * miss;
        size += want * want;
      }
    }
    const double relative = std::sqrt(error / size);
    std::printf("[%ld, %ld] mean %g: relative Frobenius error %.2g\n", static_cast<long>(c.tokens),
                static_cast<long>(c.in), c.mean, relative);
    CHECK(relative < 5e-7, "[%ld, %ld]: relative error %g", c.tokens, c.in, relative);
  }
}

// A value that is not finite shows in its column, the diagonal included, and nowhere else.
void values_that_are_not_finite() {
  constexpr std::int64_t kIn = 140, kColumn = 133;
  for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    GuardedMatrix x(DType::float32, 300, kIn, kIn);
    x.fill_normal();
    x.set(270, kColumn, bad);
    const std::vector<float> gram = gram_of(x);
    for (std::int64_t i = 0; i < kIn; ++i) {
      for (std::int64_t j = 0; j < kIn; ++j) {
        const bool finite = std::isfinite(gram[static_cast<std::size_t>(i * kIn + j)]);
        CHECK(finite == (i != kColumn && j != kColumn), "%g shows wrongly at %ld %ld", bad, i, j);
      }
    }
    std::vector<std::uint8_t> mask(300, 1);
    mask[270] = 0;
    for (float g : gram_of(x, mask)) CHECK(std::isfinite(g), "%g in a token that does not count", bad);
  }
  // The nearest bfloat16 of the largest float32 is infinite; what it becomes here is not.
  GuardedMatrix x(DType::float32, 1, 8, 8);
  for (std::int64_t j = 0; j < 8; ++j) x.set(0, j, 1e-30 * static_cast<double>(j));
  x.set(0, 3, std::numeric_limits<float>::max());
  const std::vector<float> gram = gram_of(x);
  CHECK(!std::isfinite(gram[3 * 8 + 3]), "an overflow was lost: %g", gram[3 * 8 + 3]);
  for (std::int64_t j = 0; j < 8; ++j) {
    if (j == 3) continue;
    const double want = x.value(0, 3) * x.value(0, j), got = gram[static_cast<std::size_t>(3 * 8 + j)];
    CHECK(std::fabs(got - want) <= 3e-7 * want, "beyond bfloat16's range: %g for %g", got, want);
  }
}

void failures_are_seen() {
  GuardedMatrix x(DType::float32, 300, 136, 136);  // two chunks
  x.fill_normal();
  std::vector<float> gram(136 * 136);
  Guarded workspace(hpa::cuda::gram_workspace_bytes(x.view(), kKernel));
  const auto call = [&](void* memory) {
    return hpa::cuda::gram_accumulate(x.view(), nullptr, gram.data(), 136, memory, nullptr, kKernel);
  };
  expect_launch_failures("float32 by wgmma", [&] { return call(workspace.as()); });
  CHECK(call(workspace.as()).ok() && hpa_emulation::settings().launches >= 4, "two chunks are four launches");
  expect_invalid("no workspace", call(nullptr));
  expect_invalid("a misaligned workspace", call(workspace.as<char>() + 8));
}

// The workspace does not grow with the tokens.
void memory_is_bounded() {
  const auto bytes = [](std::int64_t tokens) {
    return hpa::cuda::gram_workspace_bytes({nullptr, DType::float32, tokens, 2048, 2048}, kKernel);
  };
  CHECK(bytes(100000) == bytes(1000000), "%zu and %zu bytes", bytes(100000), bytes(1000000));
  CHECK(bytes(100000) == std::size_t{3} * 256 * 2048 * 2, "%zu bytes", bytes(100000));
}

}  // namespace

int main() {
  parts_are_exact();
  products_of_one_token();
  long_sums();
  values_that_are_not_finite();
  failures_are_seen();
  memory_is_bounded();
  return report("cuda_emulation_gram_sm90_split");
}
