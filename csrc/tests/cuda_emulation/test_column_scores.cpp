// Emulated column_scores against float64 loops.
#include "test_support.h"

using namespace test;

namespace {

void one(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t gap, std::int64_t misaligned) {
  GuardedMatrix w_old(dtype, rows, columns, columns + gap, misaligned), w_new(dtype, rows, columns, columns + 2 * gap);
  w_old.fill_normal();
  w_new.fill_normal();
  std::vector<double> squares(static_cast<std::size_t>(columns));
  double inner = 0, norm = 0, inner_size = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const double before = w_old.value(i, j), update = w_new.value(i, j) - before;
      squares[static_cast<std::size_t>(j)] += update * update;
      inner += update * before;
      inner_size += std::fabs(update * before);
      norm += before * before;
    }
  }
  in_every_order(
      "column_scores",
      [&](Bytes& bytes) {
        Guarded result(static_cast<std::size_t>(columns) * 4), scalars(8);
        Guarded workspace(hpa::cuda::column_scores_workspace_bytes(rows, columns));
        const hpa::ColumnScores scores{result.as<float>(), scalars.as<float>(), scalars.as<float>() + 1};
        const Status status = hpa::cuda::column_scores(w_old.view(), w_new.view(), scores, workspace.as(), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(result.intact() && scalars.intact() && workspace.intact(), "guards, %ld x %ld", rows, columns);
        for (std::int64_t j = 0; j < columns; ++j) {
          const double want = squares[static_cast<std::size_t>(j)];
          CHECK(std::fabs(result.as<float>()[j] - want) <= 2e-6 * want, "%s [%ld, %ld] column %ld: %g for %g",
                name_of(dtype), rows, columns, j, result.as<float>()[j], want);
        }
        CHECK(std::fabs(*scores.inner_product - inner) <= 1e-6 * inner_size, "%g for %g", *scores.inner_product, inner);
        CHECK(std::fabs(*scores.old_squared_norm - norm) <= 1e-6 * norm, "%g for %g", *scores.old_squared_norm, norm);
        append(bytes, result.as(), static_cast<std::size_t>(columns) * 4);
        append(bytes, scalars.as(), 8);
      },
      3);
}

// `count` layers of all kinds in one list: the bits that each gets alone, in so many launches.
void list(int count, int launches) {
  const std::int64_t shapes[][2] = {{3, 7}, {0, 5}, {70, 264}, {5, 0}, {33, 17}, {1, 1}, {40, 8}};
  struct Layer {
    GuardedMatrix w_old, w_new;
    Guarded squares, scalars;
  };
  std::vector<Layer> layers;
  layers.reserve(static_cast<std::size_t>(count));
  std::vector<hpa::ColumnScoresItem> items;
  for (int i = 0; i < count; ++i) {
    const auto [rows, columns] = shapes[i % 7];
    const DType dtype = kDTypes[i / 2 % 3];
    const std::int64_t gap = i % 4 == 0 ? 3 : 8 - columns % 8;  // every fourth layer cannot be read 16 bytes at a time
    layers.push_back({GuardedMatrix(dtype, rows, columns, columns + gap),
                      GuardedMatrix(dtype, rows, columns, columns + 8 - columns % 8),
                      Guarded(static_cast<std::size_t>(columns) * 4), Guarded(8)});
    Layer& layer = layers.back();
    layer.w_old.fill_normal();
    layer.w_new.fill_normal();
    items.push_back({layer.w_old.view(),
                     layer.w_new.view(),
                     {layer.squares.as<float>(), layer.scalars.as<float>(), layer.scalars.as<float>() + 1}});
  }
  const std::int64_t length = static_cast<std::int64_t>(items.size());
  in_every_order(
      "column_scores_list",
      [&](Bytes& bytes) {
        Guarded workspace(hpa::cuda::column_scores_list_workspace_bytes(items.data(), length));
        const Status status = hpa::cuda::column_scores_list(items.data(), length, workspace.as(), nullptr);
        CHECK(status.ok(), "%s", status.message);
        CHECK(hpa_emulation::settings().launches == launches, "%d launches", hpa_emulation::settings().launches);
        CHECK(workspace.intact(), "workspace");
        for (const hpa::ColumnScoresItem& item : items) {
          append(bytes, item.result.squared_update, static_cast<std::size_t>(item.w_old.columns) * 4);
          append(bytes, item.result.inner_product, 4);
          append(bytes, item.result.old_squared_norm, 4);
        }
      },
      3);
  for (Layer& layer : layers) {
    const std::size_t columns = static_cast<std::size_t>(layer.w_old.columns());
    CHECK(layer.squares.intact() && layer.scalars.intact(), "guards of a layer");
    std::vector<float> squares(columns + 1), scalars(2);
    Guarded workspace(hpa::cuda::column_scores_workspace_bytes(layer.w_old.rows(), layer.w_old.columns()));
    const hpa::ColumnScores alone{squares.data(), &scalars[0], &scalars[1]};
    CHECK(hpa::cuda::column_scores(layer.w_old.view(), layer.w_new.view(), alone, workspace.as(), nullptr).ok(),
          "alone");
    CHECK(std::memcmp(squares.data(), layer.squares.as(), columns * 4) == 0, "squares of a layer as alone");
    CHECK(std::memcmp(scalars.data(), layer.scalars.as(), 8) == 0, "scalars of a layer as alone");
  }
}

void far_rows() {
  FarRows w_old(DType::float16, 3, 24), w_new(DType::float16, 3, 24);
  if (!w_old.exists() || !w_new.exists()) return;
  w_old.fill_normal();
  w_new.fill_normal();
  float squares[24], inner, norm;
  Guarded workspace(hpa::cuda::column_scores_workspace_bytes(3, 24));
  const Status status =
      hpa::cuda::column_scores(w_old.view(), w_new.view(), {squares, &inner, &norm}, workspace.as(), nullptr);
  CHECK(status.ok(), "%s", status.message);
  for (std::int64_t j = 0; j < 24; ++j) {
    double want = 0;
    for (std::int64_t i = 0; i < 3; ++i) want += std::pow(w_new.value(i, j) - w_old.value(i, j), 2);
    CHECK(std::fabs(squares[j] - want) <= 1e-6 * want, "far rows, column %ld: %g for %g", j, squares[j], want);
  }
}

}  // namespace

int main() {
  far_rows();
  list(7, 2);    // the small table
  list(40, 2);   // the large one
  list(300, 4);  // more than it holds
  CHECK(hpa::cuda::column_scores_list(nullptr, 0, nullptr, nullptr).ok(), "empty list");
  expect_invalid("no items", hpa::cuda::column_scores_list(nullptr, 1, nullptr, nullptr));
  expect_invalid("a negative count", hpa::cuda::column_scores_list(nullptr, -1, nullptr, nullptr));
  for (DType dtype : kDTypes) {
    one(dtype, 70, 264, 8, 0);
    one(dtype, 200, 40, 0, 0);
    one(dtype, 33, 13, 3, 0);
    one(dtype, 300, 515, 1, 1);
    one(dtype, 1, 1, 0, 0);
    one(dtype, 7, 8, 0, 5);
    one(dtype, 0, 9, 0, 0);
    one(dtype, 9, 0, 0, 0);
    one(dtype, 0, 0, 0, 0);
  }
  one(DType::bfloat16, 1100, 24, 0, 0);
  GuardedMatrix a(DType::float16, 4, 16, 16), b(DType::float16, 4, 16, 16), wide(DType::float32, 4, 16, 16);
  GuardedMatrix shorter(DType::float16, 3, 16, 16);
  a.fill_normal();
  b.fill_normal();
  float squares[16], inner, norm;
  const hpa::ColumnScores fine{squares, &inner, &norm};
  Guarded workspace(hpa::cuda::column_scores_workspace_bytes(4, 16));
  const auto call = [&](hpa::ConstMatrix x, hpa::ConstMatrix y, hpa::ColumnScores r, void* w) {
    return hpa::cuda::column_scores(x, y, r, w, nullptr);
  };
  expect_launch_failures("column_scores", [&] { return call(a.view(), b.view(), fine, workspace.as()); });
  expect_invalid("another dtype", call(a.view(), wide.view(), fine, workspace.as()));
  expect_invalid("another shape", call(a.view(), shorter.view(), fine, workspace.as()));
  expect_invalid("no result", call(a.view(), b.view(), {nullptr, &inner, &norm}, workspace.as()));
  expect_invalid("no scalar", call(a.view(), b.view(), {squares, nullptr, &norm}, workspace.as()));
  expect_invalid("no workspace", call(a.view(), b.view(), fine, nullptr));
  // NaN spreads to its column and to the scalars, and nowhere else.
  a.set(2, 5, NAN);
  CHECK(call(a.view(), b.view(), fine, workspace.as()).ok(), "NaN");
  CHECK(std::isnan(squares[5]) && !std::isnan(squares[4]) && std::isnan(inner) && std::isnan(norm), "NaN");
  return report("cuda_emulation_column_scores");
}
