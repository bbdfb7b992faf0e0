// Emulated low_rank against plain loops in float64: all products, ragged tiles, strides, aliasing, the stored form,
// invalid arguments.
#include "test_support.h"

using namespace test;

namespace {

struct Types {
  DType w, a, b;
};

struct Case {
  GuardedMatrix w, a, b;
  float scaling = 1.375f;

  // gap 8: rows on 16-byte boundaries wherever the sizes allow; 1: nowhere.
  Case(Types t, std::int64_t rows, std::int64_t columns, std::int64_t rank, std::int64_t gap, std::int64_t misaligned)
      : w(t.w, rows, columns, columns + gap, misaligned),
        a(t.a, rank, columns, columns + gap, misaligned),
        b(t.b, rows, rank, rank + gap) {
    w.fill_normal();
    a.fill_normal();
    b.fill_normal();
  }
  std::int64_t rank() { return a.view().rows; }
  hpa::LowRankUpdate update() { return {a.view(), b.view(), scaling}; }
  double delta(std::int64_t i, std::int64_t j, double* error) {
    double sum = 0, size = 0;
    for (std::int64_t k = 0; k < rank(); ++k) {
      sum += b.value(i, k) * a.value(k, j);
      size += std::fabs(b.value(i, k) * a.value(k, j));
    }
    *error = 1.375 * size * static_cast<double>(rank() + 4) * std::ldexp(1.0, -23);
    return 1.375 * sum;
  }
};

void scores(Types t, std::int64_t rows, std::int64_t columns, std::int64_t rank, std::int64_t gap,
            std::int64_t misaligned) {
  Case c(t, rows, columns, rank, gap, misaligned);
  std::vector<double> exact(static_cast<std::size_t>(columns)), allowed(exact);
  double inner = 0, inner_size = 0, norm = 0;
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) {
      double error;
      const double d = c.delta(i, j, &error), old = c.w.value(i, j);
      exact[static_cast<std::size_t>(j)] += d * d;
      allowed[static_cast<std::size_t>(j)] += 2 * std::fabs(d) * error + 1e-5 * d * d;
      inner += d * old;
      inner_size += std::fabs(d * old) + 1e5 * error * std::fabs(old);
      norm += old * old;
    }
  }
  in_every_order("low_rank_scores", [&](Bytes& bytes) {
    Guarded squared(static_cast<std::size_t>(columns) * 4), scalars(8);
    Guarded workspace(hpa::cuda::low_rank_scores_workspace_bytes(rows, columns));
    const Status status = hpa::cuda::low_rank_scores(
        c.w.view(), c.update(), {squared.as<float>(), scalars.as<float>(), scalars.as<float>() + 1},
        workspace.as<void>(), nullptr);
    CHECK(status.ok(), "%s", status.message);
    CHECK(squared.intact() && scalars.intact() && workspace.intact(), "guards");
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::size_t n = static_cast<std::size_t>(j);
      CHECK(std::fabs(squared.as<float>()[n] - exact[n]) <= allowed[n], "%s %s %ld x %ld rank %ld column %ld: %g %g",
            name_of(t.w), name_of(t.a), rows, columns, rank, j, squared.as<float>()[n], exact[n]);
    }
    CHECK(std::fabs(scalars.as<float>()[0] - inner) <= 1e-5 * inner_size, "inner product");
    CHECK(std::fabs(scalars.as<float>()[1] - norm) <= 1e-5 * norm, "norm");
    append(bytes, squared.as<float>(), static_cast<std::size_t>(columns) * 4);
    append(bytes, scalars.as<float>(), 8);
  });
}

void merge(Types t, std::int64_t rows, std::int64_t columns, std::int64_t rank, std::int64_t gap,
           std::int64_t misaligned, bool in_place, hpa::MaskAxis axis) {
  Case c(t, rows, columns, rank, gap, misaligned);
  const bool by_column = axis == hpa::MaskAxis::input;
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(by_column ? columns : rows));
  for (auto& m : mask) m = static_cast<std::uint8_t>(below(2) * (1 + below(200)));
  mask[0] = 7;
  c.w.set(0, 0, NAN);  // retained, and the garbage in A or B beside it is not used
  const float coefficient = 0.37f;
  std::vector<float> gain(mask.size());
  Case stored = c;
  for (std::size_t n = 0; n < mask.size(); ++n) {
    gain[n] = mask[n] != 0 ? 1.0f : 1.0f - coefficient;
    for (std::int64_t k = 0; mask[n] != 0 && k < rank; ++k) {
      const std::int64_t at = static_cast<std::int64_t>(n);
      if (by_column) {
        stored.a.set(k, at, 0), c.a.set(k, at, INFINITY);
      } else {
        stored.b.set(at, k, 0), c.b.set(at, k, INFINITY);
      }
    }
  }
  in_every_order("low_rank_merge", [&](Bytes& bytes) {
    GuardedMatrix first = c.w, other(t.w, rows, columns, columns + gap, misaligned), plain = other;
    GuardedMatrix& out = in_place ? first : other;
    const Status status =
        hpa::cuda::low_rank_merge(first.view(), c.update(), mask.data(), axis, &coefficient, out.target(), nullptr);
    CHECK(status.ok(), "%s", status.message);
    CHECK(hpa::cuda::low_rank_add(c.w.view(), stored.update(), gain.data(), axis, plain.target(), nullptr).ok(), "add");
    CHECK(first.intact() && other.intact() && plain.intact(), "guards, %ld x %ld", rows, columns);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const std::uint32_t got = out.bits(i, j);
        append(bytes, &got, 4);
        if (mask[static_cast<std::size_t>(by_column ? j : i)] != 0) {
          CHECK(got == c.w.bits(i, j), "retained at %ld %ld", i, j);
          continue;
        }
        CHECK(got == plain.bits(i, j), "the stored form at %ld %ld", i, j);
        double error;
        const double d = c.delta(i, j, &error), kept = c.w.value(i, j) * (1.0f - coefficient);
        error += 3e-7 * (std::fabs(kept) + std::fabs(d));
        const double value = decode(t.w, got);
        CHECK(
            decode(t.w, encode(t.w, kept + d - error)) <= value && value <= decode(t.w, encode(t.w, kept + d + error)),
            "%s %s [%ld, %ld] rank %ld at %ld %ld: %g for %g", name_of(t.w), name_of(t.a), rows, columns, rank, i, j,
            value, kept + d);
      }
    }
  });
}

}  // namespace

int main() {
  constexpr DType f32 = DType::float32, f16 = DType::float16, bf16 = DType::bfloat16;
  for (const Types t : {Types{bf16, bf16, bf16}, Types{f32, bf16, bf16}, Types{f16, f16, f16}, Types{bf16, f32, f32},
                        Types{f32, f32, f32}, Types{bf16, bf16, f32}}) {
    scores(t, 140, 136, 40, 8, 0);
    scores(t, 33, 17, 5, 1, 1);
    scores(t, 1, 1, 1, 0, 0);
    scores(t, 9, 40, 0, 8, 0);
    for (const hpa::MaskAxis axis : {hpa::MaskAxis::input, hpa::MaskAxis::output}) {
      merge(t, 140, 136, 40, 8, 0, false, axis);
      merge(t, 131, 264, 8, 8, 0, true, axis);
      merge(t, 33, 17, 5, 1, 1, true, axis);
      merge(t, 9, 24, 0, 8, 0, false, axis);
    }
  }
  scores({bf16, bf16, bf16}, 260, 272, 72, 0, 0);  // three stages, several tiles each way
  scores({bf16, bf16, bf16}, 0, 8, 2, 0, 0);

  Case c({bf16, bf16, bf16}, 4, 16, 8, 0, 0);
  GuardedMatrix out(bf16, 4, 16, 16), wide(f32, 4, 16, 16);
  std::vector<std::uint8_t> mask(16, 1);
  const float coefficient = 0.5f;
  float sums[18];
  alignas(16) unsigned char workspace[1024];
  const auto input = hpa::MaskAxis::input;
  const auto call = [&](hpa::ConstMatrix w, hpa::LowRankUpdate update, const std::uint8_t* m, const float* k,
                        hpa::Matrix target) {
    return hpa::cuda::low_rank_merge(w, update, m, input, k, target, nullptr);
  };
  expect_launch_failures("low_rank_merge",
                         [&] { return call(c.w.view(), c.update(), mask.data(), &coefficient, out.target()); });
  expect_launch_failures("low_rank_scores", [&] {
    return hpa::cuda::low_rank_scores(c.w.view(), c.update(), {sums, sums + 16, sums + 17}, workspace, nullptr);
  });
  expect_invalid("no mask", call(c.w.view(), c.update(), nullptr, &coefficient, out.target()));
  expect_invalid("no coefficient", call(c.w.view(), c.update(), mask.data(), nullptr, out.target()));
  expect_invalid("another output dtype", call(c.w.view(), c.update(), mask.data(), &coefficient, wide.target()));
  expect_invalid("a and b exchanged",
                 call(c.w.view(), {c.b.view(), c.a.view(), 1}, mask.data(), &coefficient, out.target()));
  expect_invalid("no workspace",
                 hpa::cuda::low_rank_scores(c.w.view(), c.update(), {sums, sums + 16, sums + 17}, nullptr, nullptr));
  expect_invalid("no sums", hpa::cuda::low_rank_scores(c.w.view(), c.update(), {nullptr, sums + 16, sums + 17},
                                                       workspace, nullptr));
  hpa::Matrix shifted = c.w.target();
  shifted.row_stride = 17;
  expect_invalid("alias with another stride", call(c.w.view(), c.update(), mask.data(), &coefficient, shifted));
  return report("cuda_emulation_low_rank");
}
