// Inner loop of column_scores: one strip of rows, both weights read once, column sums kept in the first-level cache.
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

struct Strip {
  std::int64_t old_stride, new_stride, columns;
  float* squared_update;
  double inner[kLanes], norm[kLanes];
};

// Bytes that each stream is fetched ahead: the hardware follows eight streams, but too closely (+20 % on Zen 5).
constexpr std::int64_t kFetchAhead = 512;

// Scalars leave their float32 registers after this many vectors: a longer sum of squares would lose digits that the
// order of torch's pairwise sums keeps.
constexpr std::int64_t kScalarColumns = 32 * kLanes;

// kRows rows at once: as many streams as the prefetchers follow, and one update of the column sums for all of them.
template <typename T, int kRows>
HPA_INLINE void add_rows(const T* w_old, const T* w_new, Strip& strip) {
  const std::int64_t whole = strip.columns / kLanes * kLanes;
  for (std::int64_t begin = 0; begin < strip.columns; begin += kScalarColumns) {
    F32 inner[kRows] = {}, norm[kRows] = {};
    const std::int64_t end = begin + kScalarColumns < whole ? begin + kScalarColumns : whole;
    std::int64_t j = begin;
    for (; j < end; j += kLanes) {
      F32 squared = load_vector<F32>(strip.squared_update + j);
      HPA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const F32 before = load(w_old + row * strip.old_stride + j);
        const F32 update = load(w_new + row * strip.new_stride + j) - before;
        squared = multiply_add(update, update, squared);
        inner[row] = multiply_add(update, before, inner[row]);
        norm[row] = multiply_add(before, before, norm[row]);
      }
      store_vector(strip.squared_update + j, squared);
    }
    if (const std::int64_t left = strip.columns - j; left > 0 && left < kLanes) {
      F32 squared = load(strip.squared_update + j, left);
      HPA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const F32 before = load(w_old + row * strip.old_stride + j, left);
        const F32 update = load(w_new + row * strip.new_stride + j, left) - before;
        squared = multiply_add(update, update, squared);
        inner[row] = multiply_add(update, before, inner[row]);
        norm[row] = multiply_add(before, before, norm[row]);
      }
      store_stored(strip.squared_update + j, squared, left);
      begin = strip.columns;  // the rest is done
    }
    for (int row = 1; row < kRows; ++row) inner[0] += inner[row], norm[0] += norm[row];
    for (int lane = 0; lane < kLanes; ++lane) {
      strip.inner[lane] += static_cast<double>(inner[0][lane]);
      strip.norm[lane] += static_cast<double>(norm[0][lane]);
    }
  }
}

template <typename T>
void column_scores(const void* w_old, std::int64_t old_stride, const void* w_new, std::int64_t new_stride,
                   std::int64_t rows, std::int64_t columns, float* squared_update, double* scalars) {
  constexpr int kRows = 4;
  const T* before = static_cast<const T*>(w_old);
  const T* after = static_cast<const T*>(w_new);
  Strip strip = {old_stride, new_stride, columns, squared_update, {}, {}};
  for (std::int64_t j = 0; j < columns; ++j) squared_update[j] = 0;
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    add_rows<T, kRows>(before + row * old_stride, after + row * new_stride, strip);
  }
  for (; row < rows; ++row) add_rows<T, 1>(before + row * old_stride, after + row * new_stride, strip);
  scalars[0] = scalars[1] = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    scalars[0] += strip.inner[lane];
    scalars[1] += strip.norm[lane];
  }
}

}  // namespace

void fill_column_scores(Kernels& kernels) {
  kernels.column_scores[0] = column_scores<float>;
  kernels.column_scores[1] = column_scores<Float16>;
  kernels.column_scores[2] = column_scores<BFloat16>;
}

}  // namespace hpa::cpu::HPA_ISA
