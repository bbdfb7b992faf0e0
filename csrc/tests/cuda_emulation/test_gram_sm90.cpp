// Emulated gram by wgmma, beyond what test_gram.cpp asks of both kernels: lists of samples, masks that take whole
// stages, more tiles than blocks, which samples it takes, the order of tiles, and devices that have no wgmma.
#include <set>

#include "cuda/gram_order.cuh"
#include "test_support.h"

using namespace test;
using hpa::cuda::GramKernel;
using hpa::cuda::GramSample;

namespace {

struct Part {
  GuardedMatrix x;
  std::vector<std::uint8_t> mask;
  bool masked;

  GramSample sample() { return {x.view(), masked ? mask.data() : nullptr}; }
  bool counts(std::int64_t token) const { return !masked || mask[static_cast<std::size_t>(token)] != 0; }
};

// keep(token): whether it counts.
template <class Keep>
Part part(DType dtype, std::int64_t tokens, std::int64_t in, bool masked, Keep&& keep) {
  Part made{GuardedMatrix(dtype, tokens, in, (in + 15) / 8 * 8), {}, masked};
  made.x.fill_normal();
  for (std::int64_t t = 0; t < tokens; ++t) {
    made.mask.push_back(keep(t) ? 1 : 0);
    for (std::int64_t j = 0; masked && !keep(t) && j < in; ++j) made.x.set(t, j, NAN);
  }
  return made;
}

// The list against float64 loops, and bit for bit in every order of threads.
void check_list(const char* what, std::vector<Part>& parts, std::int64_t in, int orders = 3) {
  std::vector<GramSample> samples;
  for (Part& p : parts) samples.push_back(p.sample());
  const auto count = static_cast<std::int64_t>(samples.size());
  CHECK(hpa::cuda::gram_kernel_of(samples.data(), count, GramKernel::wgmma) == GramKernel::wgmma, "%s", what);
  std::vector<double> want(static_cast<std::size_t>(in * in)), size(want.size());
  for (Part& p : parts) {
    for (std::int64_t t = 0; t < p.x.rows(); ++t) {
      if (!p.counts(t)) continue;
      std::vector<double> row;
      for (std::int64_t i = 0; i < in; ++i) row.push_back(p.x.value(t, i));
      for (std::size_t i = 0; i < row.size(); ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
          want[i * row.size() + j] += row[i] * row[j];
          size[i * row.size() + j] += std::fabs(row[i] * row[j]);
        }
      }
    }
  }
  in_every_order(
      what,
      [&](Bytes& bytes) {
        GuardedMatrix gram(DType::float32, in, in, in);
        for (std::int64_t i = 0; i < in; ++i) {
          for (std::int64_t j = 0; j < in; ++j) gram.set(i, j, 0.0);
        }
        const std::size_t bytes_needed = hpa::cuda::gram_list_workspace_bytes(samples.data(), count, GramKernel::wgmma);
        Guarded workspace(bytes_needed);
        std::memset(workspace.as(), 0xff, bytes_needed);  // NaN: what stood there must not be added to
        const Status status = hpa::cuda::gram_accumulate_list(samples.data(), count, static_cast<float*>(gram.data()),
                                                              in, workspace.as(), nullptr, GramKernel::wgmma);
        CHECK(status.ok(), "%s: %s", what, status.message);
        CHECK(gram.intact() && workspace.intact(), "%s: guards", what);
        for (std::int64_t i = 0; i < in; ++i) {
          for (std::int64_t j = 0; j <= i; ++j) {
            const auto at = static_cast<std::size_t>(i * in + j);
            CHECK(gram.bits(i, j) == gram.bits(j, i), "%s: not symmetric at %ld %ld", what, i, j);
            CHECK(std::fabs(gram.value(i, j) - want[at]) <= 1e-6 * size[at] + 1e-6, "%s at %ld %ld: %g for %g", what, i,
                  j, gram.value(i, j), want[at]);
          }
        }
        append(bytes, gram.data(), static_cast<std::size_t>(in * in) * 4);
      },
      orders);
}

void lists() {
  const auto all = [](std::int64_t) { return true; };
  for (DType dtype : kDTypes) {
    std::vector<Part> parts;
    for (std::int64_t tokens : {70, 1, 64, 200, 128}) {
      parts.push_back(
          part(dtype, tokens, 136, tokens == 70 || tokens == 200, [](std::int64_t t) { return t % 5 != 2; }));
    }
    parts.push_back(part(dtype, 0, 136, false, all));
    check_list("a list", parts, 136);
  }
  {
    std::vector<Part> parts;  // two launches
    for (int i = 0; i < 30; ++i) parts.push_back(part(DType::bfloat16, 3 + i, 24, false, all));
    check_list("thirty samples", parts, 24);
    parts.clear();
    for (int i = 0; i < 30; ++i) {
      parts.push_back(part(DType::float32, 3 + i, 23, i % 2 == 0, [](std::int64_t t) { return t != 2; }));
    }
    check_list("thirty float32 samples", parts, 23);
  }
  {
    std::vector<Part> parts;  // whole stages without a token that counts, at both ends and between
    parts.push_back(part(DType::bfloat16, 330, 24, true, [](std::int64_t t) { return t / 64 == 1 || t == 290; }));
    check_list("stages without tokens", parts, 24);
    parts.clear();
    parts.push_back(part(DType::bfloat16, 130, 24, true, [](std::int64_t) { return false; }));
    check_list("no token at all", parts, 24);
    parts.clear();  // more such stages in a row than the ring has places
    parts.push_back(part(DType::bfloat16, 1000, 24, true, [](std::int64_t t) { return t < 64 || t > 960; }));
    check_list("many stages without tokens", parts, 24);
    parts.clear();  // a split of which none counts, and a last one that is shorter by a flush
    parts.push_back(part(DType::bfloat16, 1600, 24, true, [](std::int64_t t) { return t > 1000; }));
    check_list("a split without tokens", parts, 24);
  }
  {
    std::vector<Part> parts;  // 15 tiles for 3 blocks, several chunks: both warpgroups work in turns
    parts.push_back(part(DType::bfloat16, 450, 520, false, all));
    check_list("several tiles a block", parts, 520);
    parts.clear();
    parts.push_back(part(DType::bfloat16, 520, 264, true, [](std::int64_t t) { return t % 3 != 0; }));
    check_list("several masked tiles a block", parts, 264, 4);
    parts.clear();
    parts.push_back(part(DType::float32, 200, 264, true, [](std::int64_t t) { return t % 3 != 0; }));
    check_list("several float32 tiles a block", parts, 264, 4);
  }
}

void order_of_tiles() {
  for (int side : {1, 2, 11, 12, 13, 24, 32, 86, 100}) {
    const std::int64_t tiles = static_cast<std::int64_t>(side) * (side + 1) / 2;
    std::set<std::pair<int, int>> seen;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const hpa::cuda::TilePlace place = hpa::cuda::banded_place(i, side);
      CHECK(place.column >= 0 && place.column <= place.row && place.row < side, "side %d: tile %ld is %d %d", side, i,
            place.row, place.column);
      seen.insert({place.row, place.column});
    }
    CHECK(static_cast<std::int64_t>(seen.size()) == tiles, "side %d: %zu of %ld tiles", side, seen.size(), tiles);
  }
  // What 132 blocks need at a time in the middle of a large triangle.
  std::set<int> panels;
  for (std::int64_t i = 2000; i < 2132; ++i) {
    const hpa::cuda::TilePlace place = hpa::cuda::banded_place(i, 86);
    panels.insert(place.row);
    panels.insert(place.column);
  }
  CHECK(panels.size() <= 36, "%zu panels at a time", panels.size());
}

void what_it_takes() {
  GuardedMatrix x(DType::bfloat16, 65, 24, 24), shifted(DType::bfloat16, 65, 24, 24, 1),
      narrow(DType::bfloat16, 65, 24, 25);
  GuardedMatrix single(DType::float32, 65, 23, 25, 1);
  const auto kernel_of = [](GuardedMatrix& m, GramKernel wanted) {
    const GramSample sample{m.view(), nullptr};
    return hpa::cuda::gram_kernel_of(&sample, 1, wanted);
  };
  CHECK(kernel_of(x, GramKernel::wgmma) == GramKernel::wgmma, "aligned bfloat16");
  CHECK(kernel_of(x, GramKernel::mma_sync) == GramKernel::mma_sync, "not asked for");
  CHECK(kernel_of(shifted, GramKernel::wgmma) == GramKernel::mma_sync, "an odd start");
  CHECK(kernel_of(narrow, GramKernel::wgmma) == GramKernel::mma_sync, "an odd stride");
  CHECK(kernel_of(single, GramKernel::wgmma) == GramKernel::wgmma, "float32, whatever its alignment");
  CHECK(kernel_of(single, GramKernel::mma_sync) == GramKernel::mma_sync, "float32, not asked for");
  const GramSample mixed[] = {{single.view(), nullptr}, {x.view(), nullptr}};
  CHECK(hpa::cuda::gram_kernel_of(mixed, 2, GramKernel::wgmma) == GramKernel::mma_sync, "two dtypes");

  x.fill_normal();
  std::vector<float> gram(24 * 24);
  Guarded workspace(hpa::cuda::gram_workspace_bytes(x.view(), GramKernel::wgmma));
  const auto call = [&](GramKernel kernel) {
    return hpa::cuda::gram_accumulate(x.view(), nullptr, gram.data(), 24, workspace.as(), nullptr, kernel);
  };
  expect_launch_failures("gram by wgmma", [&] { return call(GramKernel::wgmma); });
  expect_invalid("an unknown kernel", call(static_cast<GramKernel>(2)));
  hpa_emulation::settings().compute_capability = 80;
  CHECK(call(GramKernel::wgmma).code == StatusCode::unavailable, "wgmma on sm_80");
  CHECK(call(GramKernel::mma_sync).ok(), "mma_sync on sm_80");
  hpa_emulation::settings() = {};

  GuardedMatrix other(DType::bfloat16, 5, 16, 16), half(DType::float16, 5, 24, 24);
  for (GuardedMatrix* second : {&other, &half}) {
    const GramSample samples[] = {{x.view(), nullptr}, {second->view(), nullptr}};
    expect_invalid("two widths or dtypes", hpa::cuda::gram_accumulate_list(samples, 2, gram.data(), 24, workspace.as(),
                                                                           nullptr, GramKernel::wgmma));
  }
  expect_invalid("no samples", hpa::cuda::gram_accumulate_list(nullptr, 1, gram.data(), 24, nullptr, nullptr));
  CHECK(hpa::cuda::gram_accumulate_list(nullptr, 0, gram.data(), 24, nullptr, nullptr).ok(), "an empty list");
}

// A list by mma_sync is the samples one after the other.
void by_mma_sync() {
  std::vector<Part> parts;
  for (std::int64_t tokens : {40, 0, 90}) {
    parts.push_back(part(DType::float32, tokens, 20, true, [](std::int64_t t) { return t % 3 != 0; }));
  }
  std::vector<GramSample> samples;
  for (Part& p : parts) samples.push_back(p.sample());
  std::vector<float> together(400), apart(400);
  Guarded workspace(hpa::cuda::gram_list_workspace_bytes(samples.data(), 3));
  CHECK(hpa::cuda::gram_accumulate_list(samples.data(), 3, together.data(), 20, workspace.as(), nullptr).ok(), "list");
  for (GramSample& s : samples) {
    CHECK(hpa::cuda::gram_accumulate(s.x, s.token_mask, apart.data(), 20, workspace.as(), nullptr).ok(), "one by one");
  }
  CHECK(together == apart, "a list by mma_sync");
}

}  // namespace

int main() {
  order_of_tiles();
  what_it_takes();
  by_mma_sync();
  lists();
  return report("cuda_emulation_gram_sm90");
}
