// Emulated gram against float64 loops: every dtype, masks over NaN, strides, the 16-byte path and the other, split
// tokens, several flushes (after 512 tokens here instead of 8192), exact symmetry; by mma.sync, and by wgmma where it
// takes the samples.
#include "test_support.h"

using namespace test;
using hpa::cuda::GramKernel;

namespace {

void one(GramKernel kernel, DType dtype, std::int64_t tokens, std::int64_t in, std::int64_t gap,
         std::int64_t misaligned, bool masked, std::int64_t gram_gap, int orders = 3) {
  GuardedMatrix x(dtype, tokens, in, in + gap, misaligned);
  x.fill_normal();
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens));
  for (auto& m : mask) m = static_cast<std::uint8_t>(below(3) == 0 ? 0 : 1 + below(255));
  if (masked) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t j = 0; mask[static_cast<std::size_t>(t)] == 0 && j < in; ++j) {
        x.set(t, j, j % 3 == 0 ? NAN : j % 3 == 1 ? INFINITY : -INFINITY);
      }
    }
  }
  GuardedMatrix start(DType::float32, in, in, in + gram_gap);
  std::vector<double> want(static_cast<std::size_t>(in * in)), size(want.size());
  for (std::int64_t i = 0; i < in; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      start.set(i, j, normal());
      start.set_bits(j, i, start.bits(i, j));
      const auto at = static_cast<std::size_t>(i * in + j);
      want[at] = start.value(i, j);
    }
  }
  std::vector<double> row(static_cast<std::size_t>(in));
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (masked && mask[static_cast<std::size_t>(t)] == 0) continue;
    for (std::int64_t i = 0; i < in; ++i) row[static_cast<std::size_t>(i)] = x.value(t, i);
    for (std::int64_t i = 0; i < in; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        const double product = row[static_cast<std::size_t>(i)] * row[static_cast<std::size_t>(j)];
        want[static_cast<std::size_t>(i * in + j)] += product;
        size[static_cast<std::size_t>(i * in + j)] += std::fabs(product);
      }
    }
  }
  in_every_order(
      "gram",
      [&](Bytes& bytes) {
        GuardedMatrix gram = start;
        const std::size_t bytes_needed = hpa::cuda::gram_workspace_bytes(x.view(), kernel);
        Guarded workspace(bytes_needed);
        std::memset(workspace.as(), 0xff, bytes_needed);  // NaN: what stood there must not be added to
        const Status status =
            hpa::cuda::gram_accumulate(x.view(), masked ? mask.data() : nullptr, static_cast<float*>(gram.data()),
                                       in + gram_gap, workspace.as(), nullptr, kernel);
        CHECK(status.ok(), "%s", status.message);
        CHECK(gram.intact() && x.intact() && workspace.intact(), "guards, %ld x %ld", tokens, in);
        for (std::int64_t i = 0; i < in; ++i) {
          for (std::int64_t j = 0; j <= i; ++j) {
            const auto at = static_cast<std::size_t>(i * in + j);
            CHECK(gram.bits(i, j) == gram.bits(j, i), "not symmetric at %ld %ld", i, j);
            CHECK(std::fabs(gram.value(i, j) - want[at]) <= 1e-6 * size[at] + 1e-6,
                  "%s [%ld, %ld]%s at %ld %ld: %g for %g", name_of(dtype), tokens, in, masked ? " masked" : "", i, j,
                  gram.value(i, j), want[at]);
            const std::uint32_t bits = gram.bits(i, j);
            append(bytes, &bits, 4);
          }
        }
      },
      orders);
}

void far_rows(GramKernel kernel) {
  FarRows x(DType::bfloat16, 3, 16);
  if (!x.exists()) return;
  x.fill_normal();
  std::vector<float> gram(256, 0.0f);
  Guarded workspace(hpa::cuda::gram_workspace_bytes(x.view(), kernel));
  const Status status = hpa::cuda::gram_accumulate(x.view(), nullptr, gram.data(), 16, workspace.as(), nullptr, kernel);
  CHECK(status.ok(), "%s", status.message);
  for (std::int64_t i = 0; i < 16; ++i) {
    for (std::int64_t j = 0; j < 16; ++j) {
      double want = 0;
      for (std::int64_t t = 0; t < 3; ++t) want += x.value(t, i) * x.value(t, j);
      CHECK(std::fabs(gram[static_cast<std::size_t>(i * 16 + j)] - want) <= 1e-5, "far rows at %ld %ld", i, j);
    }
  }
}

}  // namespace

int main() {
  far_rows(GramKernel::mma_sync);
  far_rows(GramKernel::wgmma);
  for (GramKernel kernel : {GramKernel::mma_sync, GramKernel::wgmma}) {
    for (DType dtype : kDTypes) {
      for (bool masked : {false, true}) {
        one(kernel, dtype, 37, 24, 8, 0, masked, 0);    // 16-byte path, one tile
        one(kernel, dtype, 100, 136, 0, 0, masked, 5);  // three tiles
        one(kernel, dtype, 70, 131, 5, 0, masked, 0);   // its ragged end, or element by element
        one(kernel, dtype, 33, 20, 1, 1, masked, 3);
      }
      one(kernel, dtype, 1, 1, 0, 0, false, 0);
      one(kernel, dtype, 5, 132, 4, 0, false, 0);
      one(kernel, dtype, 0, 5, 0, 0, false, 0);
      one(kernel, dtype, 5, 0, 0, 0, false, 0);
      one(kernel, dtype, 1300, 140, 4, 0, true, 2, 2);  // split tokens
      one(kernel, dtype, 900, 20, 4, 0, false, 0);      // two flushes into G itself
    }
  }
  GuardedMatrix x(DType::bfloat16, 1100, 16, 16);
  x.fill_normal();
  std::vector<float> gram(256);
  Guarded workspace(hpa::cuda::gram_workspace_bytes(x.view()));
  const auto call = [&](hpa::ConstMatrix view, float* g, std::int64_t stride, void* w) {
    return hpa::cuda::gram_accumulate(view, nullptr, g, stride, w, nullptr);
  };
  expect_launch_failures("gram", [&] { return call(x.view(), gram.data(), 16, workspace.as()); });
  expect_invalid("no gram", call(x.view(), nullptr, 16, workspace.as()));
  expect_invalid("short gram stride", call(x.view(), gram.data(), 15, workspace.as()));
  expect_invalid("no workspace", call(x.view(), gram.data(), 16, nullptr));
  hpa::ConstMatrix bad = x.view();
  bad.row_stride = 15;
  expect_invalid("short stride", call(bad, gram.data(), 16, workspace.as()));
  bad = x.view();
  bad.rows = -1;
  expect_invalid("negative rows", call(bad, gram.data(), 16, workspace.as()));
  bad = x.view();
  bad.dtype = static_cast<DType>(4);
  expect_invalid("unknown dtype", call(bad, gram.data(), 16, workspace.as()));
  return report("cuda_emulation_gram");
}
