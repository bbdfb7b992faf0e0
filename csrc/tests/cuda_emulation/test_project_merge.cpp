// Emulated project_merge against plain loops: bits, strides, both mask axes, aliasing, invalid arguments.
#include "test_support.h"

using namespace test;

namespace {

std::uint32_t expected(DType dtype, std::uint32_t old_bits, std::uint32_t new_bits, float c, bool keep) {
  if (keep) return old_bits;
  const volatile float product = c * static_cast<float>(decode(dtype, old_bits));
  const volatile float difference = static_cast<float>(decode(dtype, new_bits)) - product;
  return encode(dtype, difference);
}

void one(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t gap, std::int64_t misaligned, int alias,
         hpa::MaskAxis axis) {
  const std::int64_t stride = columns + gap;
  const float c = static_cast<float>(0.37 * normal());
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(axis == hpa::MaskAxis::input ? columns : rows));
  for (auto& m : mask) m = static_cast<std::uint8_t>(below(2) * (1 + below(200)));
  GuardedMatrix w_old(dtype, rows, columns, stride, misaligned), w_new(dtype, rows, columns, stride);
  w_old.fill_normal();
  w_new.fill_normal();
  if (rows > 0 && columns > 0) {
    w_old.set(rows - 1, columns - 1, NAN);
    w_new.set(0, 0, INFINITY);
  }
  in_every_order(
      "project_merge",
      [&](Bytes& bytes) {
        GuardedMatrix first = w_old, second = w_new, other(dtype, rows, columns, stride, misaligned);
        GuardedMatrix& out = alias == 0 ? other : alias == 1 ? first : second;
        const Status status =
            hpa::cuda::project_merge(first.view(), second.view(), mask.data(), axis, &c, out.target(), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(first.intact() && second.intact() && other.intact(), "guards, %ld x %ld", rows, columns);
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t j = 0; j < columns; ++j) {
            const bool keep = mask[static_cast<std::size_t>(axis == hpa::MaskAxis::input ? j : i)] != 0;
            const std::uint32_t want = expected(dtype, w_old.bits(i, j), w_new.bits(i, j), c, keep);
            const std::uint32_t got = out.bits(i, j);
            const bool both_nan = std::isnan(decode(dtype, want)) && std::isnan(decode(dtype, got));
            CHECK(got == want || (!keep && both_nan), "%s [%ld, %ld] at %ld %ld: %x for %x", name_of(dtype), rows,
                  columns, i, j, got, want);
            append(bytes, &got, 4);
          }
        }
      },
      3);
}

// `count` layers of all kinds in one list, in place or not: the bits that each gets alone, in so many launches.
void list(int count, int launches) {
  const std::int64_t shapes[][2] = {{3, 7}, {0, 5}, {70, 264}, {5, 0}, {33, 17}, {1, 1}, {40, 8}};
  struct Layer {
    GuardedMatrix w_old, w_new, apart;
    std::vector<std::uint8_t> mask;
    hpa::MaskAxis axis;
    float c;
  };
  std::vector<Layer> layers;
  for (int i = 0; i < count; ++i) {
    const auto [rows, columns] = shapes[i % 7];
    const DType dtype = kDTypes[i / 2 % 3];
    const std::int64_t stride = columns + (i % 4 == 0 ? 3 : 8 - columns % 8);
    layers.push_back({GuardedMatrix(dtype, rows, columns, stride), GuardedMatrix(dtype, rows, columns, stride),
                      GuardedMatrix(dtype, rows, columns, stride), std::vector<std::uint8_t>(300),
                      i % 5 < 2 ? hpa::MaskAxis::output : hpa::MaskAxis::input, static_cast<float>(normal())});
    layers.back().w_old.fill_normal();
    layers.back().w_new.fill_normal();
    for (auto& m : layers.back().mask) m = static_cast<std::uint8_t>(below(2) * (1 + below(200)));
  }
  in_every_order(
      "project_merge_list",
      [&](Bytes& bytes) {
        std::vector<Layer> now = layers;
        std::vector<hpa::ProjectMergeItem> items;
        for (std::size_t i = 0; i < now.size(); ++i) {
          GuardedMatrix& out = i % 3 == 0 ? now[i].w_old : i % 3 == 1 ? now[i].w_new : now[i].apart;
          items.push_back(
              {now[i].w_old.view(), now[i].w_new.view(), now[i].mask.data(), now[i].axis, &now[i].c, out.target()});
        }
        const Status status =
            hpa::cuda::project_merge_list(items.data(), static_cast<std::int64_t>(items.size()), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(hpa_emulation::settings().launches == launches, "%d launches", hpa_emulation::settings().launches);
        for (std::size_t i = 0; i < now.size(); ++i) {
          Layer& layer = now[i];
          Layer alone = layers[i];
          GuardedMatrix& out = i % 3 == 0 ? layer.w_old : i % 3 == 1 ? layer.w_new : layer.apart;
          CHECK(layer.w_old.intact() && layer.w_new.intact() && layer.apart.intact(), "guards of layer %zu", i);
          CHECK(hpa::cuda::project_merge(alone.w_old.view(), alone.w_new.view(), alone.mask.data(), alone.axis,
                                         &alone.c, alone.apart.target(), nullptr)
                    .ok(),
                "alone");
          for (std::int64_t r = 0; r < out.rows(); ++r) {
            for (std::int64_t c = 0; c < out.columns(); ++c) {
              const std::uint32_t got = out.bits(r, c);
              CHECK(got == alone.apart.bits(r, c), "layer %zu at %ld %ld", i, r, c);
              append(bytes, &got, 4);
            }
          }
        }
      },
      3);
}

void far_rows() {
  FarRows w_old(DType::bfloat16, 3, 40), w_new(DType::bfloat16, 3, 40), out(DType::bfloat16, 3, 40);
  if (!w_old.exists() || !w_new.exists() || !out.exists()) return;
  w_old.fill_normal();
  w_new.fill_normal();
  const float c = 0.25f;
  std::vector<std::uint8_t> mask(40);
  for (auto& m : mask) m = static_cast<std::uint8_t>(below(2));
  const Status status = hpa::cuda::project_merge(w_old.view(), w_new.view(), mask.data(), hpa::MaskAxis::input, &c,
                                                 out.target(), nullptr);
  CHECK(status.ok(), "%s", status.message);
  for (std::int64_t i = 0; i < 3; ++i) {
    for (std::int64_t j = 0; j < 40; ++j) {
      const auto want =
          expected(DType::bfloat16, w_old.bits(i, j), w_new.bits(i, j), c, mask[static_cast<std::size_t>(j)] != 0);
      CHECK(out.bits(i, j) == want, "far rows at %ld %ld", i, j);
    }
  }
}

}  // namespace

int main() {
  far_rows();
  list(7, 1);    // the small table
  list(40, 1);   // the large one
  list(300, 2);  // more than it holds
  CHECK(hpa::cuda::project_merge_list(nullptr, 0, nullptr).ok(), "empty list");
  expect_invalid("no items", hpa::cuda::project_merge_list(nullptr, 1, nullptr));
  for (DType dtype : kDTypes) {
    for (hpa::MaskAxis axis : {hpa::MaskAxis::input, hpa::MaskAxis::output}) {
      for (int alias = 0; alias < 3; ++alias) {
        one(dtype, 5, 24, 8, 0, alias, axis);    // 16-byte path
        one(dtype, 67, 300, 4, 0, alias, axis);  // its tail
        one(dtype, 9, 13, 1, 0, alias, axis);    // element by element
      }
      one(dtype, 1, 1, 0, 0, 0, axis);
      one(dtype, 1, 9, 0, 1, 0, axis);
      one(dtype, 40, 264, 0, 3, 0, axis);
      one(dtype, 0, 8, 0, 0, 0, axis);
      one(dtype, 8, 0, 0, 0, 0, axis);
    }
  }
  GuardedMatrix a(DType::bfloat16, 4, 16, 16), b(DType::bfloat16, 4, 16, 16), o(DType::bfloat16, 4, 16, 16);
  GuardedMatrix wide(DType::float32, 4, 16, 16), shorter(DType::bfloat16, 3, 16, 16);
  a.fill_normal();
  b.fill_normal();
  std::vector<std::uint8_t> mask(16, 1);
  const float c = 0.5f;
  const auto input = hpa::MaskAxis::input;
  const auto call = [&](hpa::ConstMatrix x, hpa::ConstMatrix y, const std::uint8_t* m, hpa::MaskAxis axis,
                        const float* k,
                        hpa::Matrix out) { return hpa::cuda::project_merge(x, y, m, axis, k, out, nullptr); };
  expect_launch_failures("project_merge", [&] { return call(a.view(), b.view(), mask.data(), input, &c, o.target()); });
  expect_invalid("another dtype", call(a.view(), wide.view(), mask.data(), input, &c, o.target()));
  expect_invalid("another shape", call(a.view(), shorter.view(), mask.data(), input, &c, o.target()));
  expect_invalid("another output shape", call(a.view(), b.view(), mask.data(), input, &c, shorter.target()));
  expect_invalid("no mask", call(a.view(), b.view(), nullptr, input, &c, o.target()));
  expect_invalid("no coefficient", call(a.view(), b.view(), mask.data(), input, nullptr, o.target()));
  expect_invalid("unknown axis", call(a.view(), b.view(), mask.data(), static_cast<hpa::MaskAxis>(7), &c, o.target()));
  hpa::Matrix shifted = a.target();
  shifted.row_stride = 17;
  expect_invalid("alias with another stride", call(a.view(), b.view(), mask.data(), input, &c, shifted));
  hpa::ConstMatrix bad = a.view();
  bad.row_stride = 15;
  expect_invalid("stride below columns", call(bad, b.view(), mask.data(), input, &c, o.target()));
  bad = a.view();
  bad.data = nullptr;
  expect_invalid("null data", call(bad, b.view(), mask.data(), input, &c, o.target()));
  bad = a.view();
  bad.dtype = static_cast<DType>(9);
  expect_invalid("unknown dtype", call(bad, b.view(), mask.data(), input, &c, o.target()));
  return report("cuda_emulation_project_merge");
}
