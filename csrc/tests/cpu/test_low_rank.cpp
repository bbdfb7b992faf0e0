#include <array>

#include "check.h"
#include "data.h"
#include "hpa/low_rank.h"

using namespace hpa;
using namespace hpa::test;

namespace {

struct Sizes {
  std::int64_t rows, columns, rank;
};
struct Types {
  DType w, a, b;
};

struct Case {
  GuardedMatrix w, a, b;
  float scaling = 1.375f;

  Case(Sizes s, Types t, std::int64_t padding = 5)
      : w(s.rows, s.columns, t.w, padding), a(s.rank, s.columns, t.a, 3, 1), b(s.rows, s.rank, t.b, padding / 2, 2) {
    Random random(static_cast<unsigned>(s.rows * 77 + s.columns * 5 + s.rank));
    w.fill_normal(random);
    a.fill_normal(random);
    b.fill_normal(random, 0.1);
  }
  std::int64_t rank() const { return a.view().rows; }
  LowRankUpdate update() const { return {a.view(), b.view(), scaling}; }
  // D_ij, and how far float32 sums may be from it.
  std::array<double, 2> delta(std::int64_t i, std::int64_t j) const {
    double sum = 0, size = 0;
    for (std::int64_t k = 0; k < rank(); ++k) {
      sum += b.at(i, k) * a.at(k, j);
      size += std::abs(b.at(i, k) * a.at(k, j));
    }
    return {scaling * sum, std::abs(scaling) * size * static_cast<double>(rank() + 2) * std::ldexp(1.0, -24)};
  }
};

std::string text_of(Sizes s, Types t) {
  return std::string(name_of(t.w)) + " " + name_of(t.a) + " " + name_of(t.b) + " " + std::to_string(s.rows) + "x" +
         std::to_string(s.columns) + " rank " + std::to_string(s.rank);
}

// `bits` is what rounding something within `error` of `exact` gives.
bool is_rounded(const GuardedMatrix& out, std::int64_t i, std::int64_t j, double exact, double error, DType dtype) {
  const double value = out.at(i, j);
  return decode(encode(exact - error, dtype), dtype) <= value && value <= decode(encode(exact + error, dtype), dtype);
}

void scores(Sizes s, Types t, const std::string& set) {
  const std::string context = set + " scores " + text_of(s, t);
  const Case c(s, t);
  std::vector<float> squared(s.columns + 1, -7.0f);
  float inner = -7, norm = -7;
  const Status status = cpu::low_rank_scores(c.w.view(), c.update(), {squared.data(), &inner, &norm});
  CHECK(status.ok(), context + status.message);
  CHECK(squared[s.columns] == -7.0f, context);
  double exact_inner = 0, inner_size = 0, exact_norm = 0;
  for (std::int64_t j = 0; j < s.columns; ++j) {
    double exact = 0, error = 0;
    for (std::int64_t i = 0; i < s.rows; ++i) {
      const auto [d, e] = c.delta(i, j);
      exact += d * d;
      error += 2 * std::abs(d) * e + e * e;
      exact_inner += d * c.w.at(i, j);
      inner_size += std::abs(d * c.w.at(i, j)) + std::abs(e * c.w.at(i, j)) * 1e6;
      exact_norm += c.w.at(i, j) * c.w.at(i, j);
    }
    CHECK(std::abs(squared[j] - exact) <= error + 1e-6 * exact, context);
  }
  CHECK(std::abs(inner - exact_inner) <= 1e-6 * inner_size, context);
  CHECK(std::abs(norm - exact_norm) <= 1e-6 * exact_norm, context);
}

void merge(Sizes s, Types t, MaskAxis axis, bool in_place, const std::string& set) {
  const std::string context = set + " merge " + text_of(s, t) + (axis == MaskAxis::input ? " input " : " output ") +
                              (in_place ? "in place" : "apart");
  Case c(s, t);
  c.w.set_bits(0, 0, t.w == DType::float32 ? 0x7f812345u : t.w == DType::float16 ? 0x7d23u : 0x7f91u);
  Random random(9);
  std::vector<std::uint8_t> mask(axis == MaskAxis::input ? s.columns : s.rows);
  for (auto& keep : mask) keep = random.chance(0.4) ? 255 : 0;
  mask[0] = 1;  // the signalling NaN is retained bit by bit
  const float coefficient = 0.37f;
  const GuardedMatrix before = c.w;
  GuardedMatrix apart(s.rows, s.columns, t.w, 2, 7);
  GuardedMatrix& out = in_place ? c.w : apart;
  const Status status =
      cpu::low_rank_merge(c.w.view(), c.update(), mask.data(), axis, &coefficient, out.mutable_view());
  CHECK(status.ok(), context + status.message);
  CHECK(out.guards_intact(), context);
  if (!in_place) CHECK(c.w == before, context);
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.columns; ++j) {
      if (mask[axis == MaskAxis::input ? j : i] != 0) {
        CHECK(out.bits(i, j) == before.bits(i, j), context + " retained");
        continue;
      }
      const auto [d, e] = c.delta(i, j);
      const double kept = before.at(i, j) * (1.0f - coefficient);
      CHECK(is_rounded(out, i, j, kept + d, e + 2e-7 * (std::abs(kept) + std::abs(d)), t.w), context);
    }
  }

  const GuardedMatrix merged = out;
  // The stored form of the same: a gain, and A without the retained columns or B without the retained rows.
  std::vector<float> gain(mask.size());
  for (std::size_t k = 0; k < mask.size(); ++k) gain[k] = mask[k] != 0 ? 1.0f : 1.0f - coefficient;
  c.w = before;
  c.w.set(0, 0, 0.5);
  for (std::size_t k = 0; k < mask.size(); ++k) {
    for (std::int64_t r = 0; mask[k] != 0 && r < s.rank; ++r) {
      if (axis == MaskAxis::input) c.a.set(r, static_cast<std::int64_t>(k), 0);
      if (axis == MaskAxis::output) c.b.set(static_cast<std::int64_t>(k), r, 0);
    }
  }
  GuardedMatrix stored(s.rows, s.columns, t.w, 1);
  CHECK(cpu::low_rank_add(c.w.view(), c.update(), gain.data(), axis, stored.mutable_view()).ok(), context);
  bool same = stored.guards_intact();
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = i == 0 ? 1 : 0; j < s.columns; ++j) same = same && stored.bits(i, j) == merged.bits(i, j);
  }
  CHECK(same, context + " gain");
}

// The bits of D do not depend on how the values of A and B are stored, on the layout or on the rows beside it.
void same_bits(Sizes s, const std::string& set) {
  const std::string context = set + " bits " + text_of(s, {DType::float32, DType::bfloat16, DType::bfloat16});
  const Case narrow(s, {DType::float32, DType::bfloat16, DType::bfloat16});
  Case wide(s, {DType::float32, DType::float32, DType::float32}, 0);
  GuardedMatrix turned_a(s.columns, s.rank, DType::bfloat16, 1), turned_b(s.rank, s.rows, DType::bfloat16, 2);
  GuardedMatrix turned_w(s.columns, s.rows, DType::float32, 0);
  for (std::int64_t k = 0; k < s.rank; ++k) {
    for (std::int64_t j = 0; j < s.columns; ++j) wide.a.set(k, j, narrow.a.at(k, j));
    for (std::int64_t i = 0; i < s.rows; ++i) wide.b.set(i, k, narrow.b.at(i, k));
    for (std::int64_t j = 0; j < s.columns; ++j) turned_a.set(j, k, narrow.a.at(k, j));
    for (std::int64_t i = 0; i < s.rows; ++i) turned_b.set(k, i, narrow.b.at(i, k));
  }
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.columns; ++j) turned_w.set(j, i, wide.w.at(i, j));
  }
  GuardedMatrix one(s.rows, s.columns, DType::float32), other = one, row(1, s.columns, DType::float32);
  GuardedMatrix turned(s.columns, s.rows, DType::float32);
  const auto add = [](const GuardedMatrix& w, LowRankUpdate update, GuardedMatrix& out) {
    return cpu::low_rank_add(w.view(), update, nullptr, MaskAxis::input, out.mutable_view()).ok();
  };
  CHECK(add(narrow.w, narrow.update(), one) && add(wide.w, wide.update(), other), context);
  CHECK(add(turned_w, {turned_b.view(), turned_a.view(), narrow.scaling}, turned), context);
  GuardedMatrix w_row(1, s.columns, DType::float32), b_row(1, s.rank, DType::bfloat16);
  for (std::int64_t j = 0; j < s.columns; ++j) w_row.set(0, j, narrow.w.at(s.rows - 1, j));
  for (std::int64_t k = 0; k < s.rank; ++k) b_row.set(0, k, narrow.b.at(s.rows - 1, k));
  CHECK(add(w_row, {narrow.a.view(), b_row.view(), narrow.scaling}, row), context);
  bool stored = true, transposed = true, alone = true;
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.columns; ++j) {
      stored = stored && one.bits(i, j) == other.bits(i, j);
      transposed = transposed && one.bits(i, j) == turned.bits(j, i);
      if (i == s.rows - 1) alone = alone && one.bits(i, j) == row.bits(0, j);
    }
  }
  CHECK(stored, context + " stored");
  CHECK(transposed, context + " transposed");
  CHECK(alone, context + " alone");
}

void threads(Types t, const std::string& set) {
  const Sizes s = {331, 2111, 18};
  const Case c(s, t);
  std::vector<std::uint8_t> mask(s.columns, 0);
  const float coefficient = -0.2f;
  GuardedMatrix first(s.rows, s.columns, t.w, 1);
  std::vector<float> first_squared(s.columns);
  float first_inner = 0, first_norm = 0;
  for (const std::int32_t count : {1, 2, 3}) {
    cpu::set_thread_count(count);
    GuardedMatrix out(s.rows, s.columns, t.w, 1);
    std::vector<float> squared(s.columns);
    float inner = 0, norm = 0;
    CHECK(cpu::low_rank_merge(c.w.view(), c.update(), mask.data(), MaskAxis::input, &coefficient, out.mutable_view())
              .ok(),
          set);
    CHECK(cpu::low_rank_scores(c.w.view(), c.update(), {squared.data(), &inner, &norm}).ok(), set);
    if (count == 1) first = out, first_squared = squared, first_inner = inner, first_norm = norm;
    CHECK(out == first, set + " threads");
    CHECK(squared == first_squared && inner == first_inner && norm == first_norm, set + " threads");
  }
}

// The last element of an odd rank has no partner: what an earlier call left in that memory must not count, even NaN.
void after_garbage(const std::string& set) {
  const Types t = {DType::float32, DType::bfloat16, DType::bfloat16};
  for (int repeat = 0; repeat < 3; ++repeat) {
    Case garbage({48, 96, 6}, t), odd({48, 96, 5}, t);
    for (std::int64_t i = 0; i < 48; ++i) {
      for (std::int64_t k = 0; k < 6; ++k) garbage.b.set(i, k, NAN);
    }
    GuardedMatrix out(48, 96, t.w);
    for (const Case* c : {&garbage, &odd}) {
      CHECK(cpu::low_rank_add(c->w.view(), c->update(), nullptr, MaskAxis::input, out.mutable_view()).ok(), set);
    }
    bool finite = true;
    for (std::int64_t i = 0; i < 48; ++i) {
      for (std::int64_t j = 0; j < 96; ++j) finite = finite && std::isfinite(out.at(i, j));
    }
    CHECK(finite, set + " odd rank after garbage");
  }
}

void invalid() {
  float data[8] = {}, other[4] = {}, coefficient = 1, sums[2] = {};
  const std::uint8_t mask[2] = {};
  const ConstMatrix w = {data, DType::float32, 2, 2, 2};
  const LowRankUpdate good = {{data, DType::float32, 1, 2, 2}, {data, DType::float32, 2, 1, 1}, 1};
  const Matrix out = {other, DType::float32, 2, 2, 2};
  const auto call = [&](ConstMatrix old, LowRankUpdate update, const std::uint8_t* m, const float* c, Matrix o) {
    return cpu::low_rank_merge(old, update, m, MaskAxis::input, c, o);
  };
  CHECK(call(w, good, mask, &coefficient, out).ok(), "good");
  CHECK(refused(call({data, DType::float32, 2, 2, 1}, good, mask, &coefficient, out), "w_old"), "");
  CHECK(refused(call(w, {{data, DType::float32, 1, 3, 3}, good.b, 1}, mask, &coefficient, out), "a: columns"), "");
  CHECK(refused(call(w, {good.a, {data, DType::float32, 3, 1, 1}, 1}, mask, &coefficient, out), "b: rows"), "");
  CHECK(refused(call(w, {good.a, {data, DType::float32, 2, 2, 2}, 1}, mask, &coefficient, out), "b: columns"), "");
  CHECK(refused(call(w, {{nullptr, DType::float32, 1, 2, 2}, good.b, 1}, mask, &coefficient, out), "a: data"), "");
  CHECK(refused(call(w, good, nullptr, &coefficient, out), "mask"), "");
  CHECK(refused(call(w, good, mask, nullptr, out), "coefficient"), "");
  CHECK(refused(call(w, good, mask, &coefficient, {other, DType::float16, 2, 2, 2}), "out"), "");
  CHECK(refused(call(w, good, mask, &coefficient, {data, DType::float32, 2, 2, 3}), "out"), "");
  CHECK(refused(cpu::low_rank_merge(w, good, mask, static_cast<MaskAxis>(4), &coefficient, out), "axis"), "");
  CHECK(refused(cpu::low_rank_scores(w, good, {nullptr, sums, sums + 1}), "squared_update"), "");
  CHECK(refused(cpu::low_rank_add(w, good, nullptr, MaskAxis::input, {other, DType::float32, 1, 2, 2}), "out"), "");
  const LowRankUpdate empty = {{nullptr, DType::float32, 0, 2, 2}, {nullptr, DType::float32, 0, 0, 0}, 1};
  CHECK(cpu::low_rank_scores({nullptr, DType::float32, 0, 2, 2}, empty, {sums, other, other + 1}).ok(), "empty");
  CHECK(sums[0] == 0 && sums[1] == 0 && other[0] == 0 && other[1] == 0, "empty sums");
  const LowRankUpdate narrow = {{nullptr, DType::float32, 1, 0, 0}, {data, DType::float32, 2, 1, 1}, 1};
  other[0] = other[1] = 1;
  CHECK(cpu::low_rank_scores({nullptr, DType::float32, 2, 0, 0}, narrow, {nullptr, other, other + 1}).ok(), "narrow");
  CHECK(other[0] == 0 && other[1] == 0, "sums of no column");
}

}  // namespace

int main() {
  constexpr DType f32 = DType::float32, f16 = DType::float16, bf16 = DType::bfloat16;
  for_each_instruction_set([](const std::string& set) {
    for (const Types t :
         {Types{bf16, bf16, bf16}, Types{bf16, f32, f32}, Types{f32, bf16, bf16}, Types{f32, f32, f32},
          Types{f16, f16, f16}, Types{bf16, bf16, f32}, Types{f16, bf16, bf16}, Types{f32, f16, bf16}}) {
      for (const Sizes s : {Sizes{1, 1, 1}, Sizes{7, 17, 2}, Sizes{49, 97, 5}, Sizes{9, 47, 0}, Sizes{101, 130, 33}}) {
        scores(s, t, set);
        for (const MaskAxis axis : {MaskAxis::input, MaskAxis::output}) {
          merge(s, t, axis, false, set);
          merge(s, t, axis, true, set);
        }
      }
      threads(t, set);
    }
    // Several blocks of columns: A is larger than a block's share of the cache.
    scores({5, 1500, 300}, {bf16, bf16, bf16}, set);
    scores({5, 1500, 300}, {bf16, f32, f32}, set);
    for (const Sizes s : {Sizes{50, 97, 7}, Sizes{13, 1500, 300}}) same_bits(s, set);
    after_garbage(set);
  });
  invalid();
  return report("low_rank");
}
