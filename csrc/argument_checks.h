// The checks that an operation makes on the CPU and on CUDA alike, one function for each operation. The messages are
// literals that begin with the argument's name.
#pragma once

#include <cmath>

#include "hpa/hpa.h"

#define HPA_REQUIRE(condition, message)                       \
  do {                                                        \
    if (!(condition)) return ::hpa::Status::invalid(message); \
  } while (false)

#define HPA_RETURN_UNLESS_OK(expression)                       \
  do {                                                         \
    const ::hpa::Status hpa_status_of_check = (expression);    \
    if (!hpa_status_of_check.ok()) return hpa_status_of_check; \
  } while (false)

#define HPA_REQUIRE_MATRIX(m)                                                                                 \
  do {                                                                                                        \
    HPA_REQUIRE(::hpa::is_known((m).dtype), #m ": dtype must be float32, float16 or bfloat16");               \
    HPA_REQUIRE((m).rows >= 0 && (m).columns >= 0, #m ": rows and columns must not be negative");             \
    HPA_REQUIRE((m).rows <= 1 || (m).row_stride >= (m).columns, #m ": row_stride must be at least columns");  \
    HPA_REQUIRE((m).data != nullptr || ::hpa::is_empty(m), #m ": data is null, but the matrix is not empty"); \
  } while (false)

#define HPA_REQUIRE_SAME_SHAPE(a, b)                                                                   \
  do {                                                                                                 \
    HPA_REQUIRE((a).dtype == (b).dtype, #b ": dtype must be that of " #a);                             \
    HPA_REQUIRE((a).rows == (b).rows && (a).columns == (b).columns, #b ": shape must be that of " #a); \
  } while (false)

namespace hpa {

constexpr bool is_known(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

template <typename View>
constexpr bool is_empty(const View& view) {
  return view.rows == 0 || view.columns == 0;
}

inline Status check_gram(const ConstMatrix& x, const float* gram, std::int64_t gram_stride) {
  HPA_REQUIRE_MATRIX(x);
  HPA_REQUIRE(gram_stride >= x.columns || x.columns <= 1, "gram_stride: must be at least the columns of x");
  HPA_REQUIRE(gram != nullptr || is_empty(x), "gram: must not be null");
  return {};
}

inline Status check_inverse_diagonal(const MatrixBatch& h, double damping, Precision precision,
                                     const InverseDiagonalResult& result) {
  HPA_REQUIRE(h.batch >= 0 && h.batch <= 0x7fffffff, "batch: must be between 0 and 2^31 - 1");
  HPA_REQUIRE(h.size >= 0 && h.size < 0x7fffffff, "size: must be between 0 and 2^31 - 2");
  HPA_REQUIRE(h.size <= 1 || h.row_stride >= h.size, "row_stride: must be at least size");
  HPA_REQUIRE(h.batch <= 1 || h.batch_stride >= 0, "batch_stride: must not be negative");
  HPA_REQUIRE(std::isfinite(damping) && damping >= 0, "damping: must be finite and not negative");
  HPA_REQUIRE(precision == Precision::float32 || precision == Precision::float64,
              "precision: must be float32 or float64");
  if (h.batch == 0) return {};
  HPA_REQUIRE(result.failed_minor != nullptr, "failed_minor: must not be null");
  HPA_REQUIRE(result.smallest_pivot != nullptr, "smallest_pivot: must not be null");
  if (h.size == 0) return {};
  HPA_REQUIRE(h.data != nullptr, "h: data is null, but the batch is not empty");
  HPA_REQUIRE(result.diagonal != nullptr, "diagonal: must not be null");
  return {};
}

inline Status check_inverse_diagonal_of_rows(const ConstMatrix& x, double damping, const RowsDiagonalResult& result) {
  HPA_REQUIRE_MATRIX(x);
  HPA_REQUIRE(x.rows >= 1 && x.rows < 0x7fffffff, "x: tokens must be between 1 and 2^31 - 2");
  HPA_REQUIRE(x.columns < 0x7fffffff, "x: columns must be below 2^31 - 1");
  HPA_REQUIRE(std::isfinite(damping) && damping > 0, "damping: must be finite and positive");
  HPA_REQUIRE(result.failed_minor != nullptr, "failed_minor: must not be null");
  HPA_REQUIRE(result.smallest_pivot != nullptr, "smallest_pivot: must not be null");
  HPA_REQUIRE(result.smallest_remainder != nullptr, "smallest_remainder: must not be null");
  HPA_REQUIRE(result.diagonal != nullptr || x.columns == 0, "diagonal: must not be null");
  HPA_REQUIRE(result.squares != nullptr || x.columns == 0, "squares: must not be null");
  return {};
}

inline Status check_column_scores(const ConstMatrix& w_old, const ConstMatrix& w_new, const ColumnScores& result) {
  HPA_REQUIRE_MATRIX(w_old);
  HPA_REQUIRE_MATRIX(w_new);
  HPA_REQUIRE_SAME_SHAPE(w_old, w_new);
  HPA_REQUIRE(result.squared_update != nullptr || w_old.columns == 0, "squared_update: must not be null");
  HPA_REQUIRE(result.inner_product != nullptr, "inner_product: must not be null");
  HPA_REQUIRE(result.old_squared_norm != nullptr, "old_squared_norm: must not be null");
  return {};
}

inline Status check_column_scores(const ColumnScoresItem& item) {
  return check_column_scores(item.w_old, item.w_new, item.result);
}

// counts may be null where the count itself is given.
inline Status check_column_mask(const ColumnMaskItem& item) {
  const ColumnMaskArguments& arguments = item.arguments;
  HPA_REQUIRE(arguments.batch >= 0 && arguments.batch <= 0x7fffffff, "batch: must be between 0 and 2^31 - 1");
  HPA_REQUIRE(arguments.columns >= 0 && arguments.columns <= 0x7fffffff, "columns: must be between 0 and 2^31 - 1");
  if (arguments.batch == 0 || arguments.columns == 0) return {};
  HPA_REQUIRE(arguments.scores != nullptr, "scores: must not be null");
  HPA_REQUIRE(arguments.mask != nullptr, "mask: must not be null");
  return {};
}

inline Status check_column_mask(const ColumnMaskArguments& arguments) {
  HPA_RETURN_UNLESS_OK(check_column_mask(ColumnMaskItem{arguments}));
  HPA_REQUIRE(arguments.counts != nullptr || arguments.batch == 0 || arguments.columns == 0,
              "counts: must not be null");
  return {};
}

// True where out is memory of its own, or exactly the given input.
inline bool is_same_or_apart(const ConstMatrix& in, const Matrix& out) {
  return in.data != out.data || in.rows <= 1 || in.row_stride == out.row_stride;
}

inline Status check_project_merge(const ConstMatrix& w_old, const ConstMatrix& w_new, const std::uint8_t* mask,
                                  MaskAxis axis, const float* coefficient, const Matrix& out) {
  HPA_REQUIRE_MATRIX(w_old);
  HPA_REQUIRE_MATRIX(w_new);
  HPA_REQUIRE_MATRIX(out);
  HPA_REQUIRE_SAME_SHAPE(w_old, w_new);
  HPA_REQUIRE_SAME_SHAPE(w_old, out);
  HPA_REQUIRE(axis == MaskAxis::input || axis == MaskAxis::output, "axis: must be input or output");
  if (is_empty(out)) return {};
  HPA_REQUIRE(mask != nullptr, "mask: must not be null");
  HPA_REQUIRE(coefficient != nullptr, "coefficient: must not be null");
  HPA_REQUIRE(is_same_or_apart(w_old, out), "out: row_stride must be that of w_old where out is w_old");
  HPA_REQUIRE(is_same_or_apart(w_new, out), "out: row_stride must be that of w_new where out is w_new");
  return {};
}

inline Status check_project_merge(const ProjectMergeItem& item) {
  return check_project_merge(item.w_old, item.w_new, item.mask, item.axis, item.coefficient, item.out);
}

// The list itself, then every item of it.
template <typename Item>
Status check_list(const Item* items, std::int64_t count, Status (*check)(const Item&)) {
  HPA_REQUIRE(count >= 0, "count: must not be negative");
  HPA_REQUIRE(items != nullptr || count == 0, "items: must not be null");
  for (std::int64_t i = 0; i < count; ++i) HPA_RETURN_UNLESS_OK(check(items[i]));
  return {};
}

inline Status check_low_rank(const ConstMatrix& w_old, const LowRankUpdate& update) {
  const ConstMatrix& a = update.a;
  const ConstMatrix& b = update.b;
  HPA_REQUIRE_MATRIX(w_old);
  HPA_REQUIRE_MATRIX(a);
  HPA_REQUIRE_MATRIX(b);
  HPA_REQUIRE(a.columns == w_old.columns, "a: columns must be those of w_old");
  HPA_REQUIRE(b.rows == w_old.rows, "b: rows must be those of w_old");
  HPA_REQUIRE(b.columns == a.rows, "b: columns must be the rows of a, the rank");
  HPA_REQUIRE(a.rows < 0x7fffffff, "a: the rank must be below 2^31 - 1");
  return {};
}

inline Status check_low_rank_scores(const ConstMatrix& w_old, const LowRankUpdate& update, const ColumnScores& result) {
  HPA_RETURN_UNLESS_OK(check_low_rank(w_old, update));
  return check_column_scores(w_old, w_old, result);
}

inline Status check_low_rank_add(const ConstMatrix& w_old, const LowRankUpdate& update, MaskAxis axis,
                                 const Matrix& out) {
  HPA_RETURN_UNLESS_OK(check_low_rank(w_old, update));
  HPA_REQUIRE_MATRIX(out);
  HPA_REQUIRE_SAME_SHAPE(w_old, out);
  HPA_REQUIRE(axis == MaskAxis::input || axis == MaskAxis::output, "axis: must be input or output");
  HPA_REQUIRE(is_same_or_apart(w_old, out), "out: row_stride must be that of w_old where out is w_old");
  return {};
}

inline Status check_low_rank_merge(const ConstMatrix& w_old, const LowRankUpdate& update, const std::uint8_t* mask,
                                   MaskAxis axis, const float* coefficient, const Matrix& out) {
  HPA_RETURN_UNLESS_OK(check_low_rank_add(w_old, update, axis, out));
  if (is_empty(out)) return {};
  HPA_REQUIRE(mask != nullptr, "mask: must not be null");
  HPA_REQUIRE(coefficient != nullptr, "coefficient: must not be null");
  return {};
}

inline Status check_routed_lora(const RoutedLoraArguments& r) {
  HPA_REQUIRE(is_known(r.dtype), "dtype: must be float32, float16 or bfloat16");
  HPA_REQUIRE(r.batch >= 0, "batch: must not be negative");
  HPA_REQUIRE(r.tokens >= 0, "tokens: must not be negative");
  HPA_REQUIRE(r.in >= 0, "in: must not be negative");
  HPA_REQUIRE(r.tasks >= 0, "tasks: must not be negative");
  HPA_REQUIRE(r.count >= 0, "count: must not be negative");
  HPA_REQUIRE(r.linears != nullptr || r.count == 0, "linears: must not be null");
  const bool any_token = r.batch * r.tokens != 0;
  for (std::int64_t l = 0; l < r.count; ++l) {
    const RoutedLoraLinear& linear = r.linears[l];
    HPA_REQUIRE(linear.out >= 0, "out: must not be negative");
    HPA_REQUIRE(linear.rank >= 1 || r.tasks == 0, "rank: must be at least 1");
    if (!any_token || linear.out == 0) continue;
    HPA_REQUIRE(linear.output != nullptr, "output: must not be null");
    HPA_REQUIRE(r.x != nullptr || r.in == 0, "x: must not be null");
    HPA_REQUIRE(linear.a != nullptr || r.tasks * r.in == 0, "a: must not be null");
    HPA_REQUIRE(linear.b != nullptr || r.tasks == 0, "b: must not be null");
    HPA_REQUIRE(r.weights != nullptr || r.tasks == 0, "weights: must not be null");
    HPA_REQUIRE(linear.scaling != nullptr || r.tasks == 0, "scaling: must not be null");
  }
  return {};
}

}  // namespace hpa
