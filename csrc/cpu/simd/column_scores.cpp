// Inner loop of column_scores: one strip of rows, both weights read once, column sums kept in the nearest caches.
#include "cpu/simd/convert.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

// Rows are read whole, one after the other, so that each weight is one stream from the strip's beginning to its end:
// two rows of both weights at once take 40 % longer, pieces of 4096 out of 11008 columns 45 % (Zen 5).
// Bytes that each stream is fetched ahead, across the pages' ends, where the hardware stops (+14 %).
constexpr std::int64_t kFetchAhead = 2048;
constexpr std::int64_t kLine = 64;

constexpr std::int64_t kGroup = 2 * kLanes;

// Scalars leave their float32 registers after this many columns, 32 additions in each lane: a longer sum of squares
// would lose digits that the order of torch's pairwise sums keeps.
constexpr std::int64_t kScalarColumns = 32 * kGroup;

// kGroup neighbouring columns.
struct Group {
  F32 first, second;
};

template <typename T>
HPA_INLINE Group load_group(const T* p) {
  return {load(p), load(p + kLanes)};
}
// Even columns, then odd ones: two operations for two vectors, where widening either half takes two for one.
HPA_INLINE Group load_group(const BFloat16* p) {
  const U32 pairs = load_vector<U32>(p);
  return {(F32)(pairs << 16), (F32)(pairs & 0xffff0000u)};
}

// Column sums out of the order that load_group() gives them.
template <typename T>
HPA_INLINE void write_in_order(const T*, const float* sums, std::int64_t columns, float* out) {
  __builtin_memcpy(out, sums, static_cast<std::size_t>(columns) * sizeof(float));
}
HPA_INLINE void write_in_order(const BFloat16*, const float* sums, std::int64_t columns, float* out) {
  std::int64_t j = 0;
  for (; j + kGroup <= columns; j += kGroup) {
    HPA_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      out[j + 2 * i] = sums[j + i];
      out[j + 2 * i + 1] = sums[j + kLanes + i];
    }
  }
  for (; j < columns; ++j) out[j] = sums[j];
}

template <typename T>
HPA_INLINE void fetch_ahead(const T* p) {
  const char* ahead = reinterpret_cast<const char*>(p) + kFetchAhead;
  HPA_UNROLL
  for (std::int64_t byte = 0; byte < kGroup * static_cast<std::int64_t>(sizeof(T)); byte += kLine) {
    __builtin_prefetch(ahead + byte);
  }
}

typedef float HalfF32 __attribute__((vector_size(kVectorBytes / 2)));

// Sums in each lane, in float64.
struct Wide {
  F64 low, high;

  HPA_INLINE void add(F32 v) {
    HalfF32 halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    low += __builtin_convertvector(halves[0], F64);
    high += __builtin_convertvector(halves[1], F64);
  }
  double sum() const {
    double total = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) total += low[lane];
    for (int lane = 0; lane < kLanes / 2; ++lane) total += high[lane];
    return total;
  }
};

struct Scalars {
  Wide inner, norm;
};

HPA_INLINE void add_products(F32 before, F32 after, F32& squared, F32& inner, F32& norm) {
  const F32 update = after - before;
  squared = multiply_add(update, update, squared);
  inner = multiply_add(update, before, inner);
  norm = multiply_add(before, before, norm);
}

template <typename T>
HPA_INLINE void add_row(const T* w_old, const T* w_new, std::int64_t columns, float* squares, Scalars& scalars) {
  const std::int64_t whole = columns / kGroup * kGroup;
  std::int64_t j = 0;
  while (j < whole) {
    const std::int64_t end = j + kScalarColumns < whole ? j + kScalarColumns : whole;
    F32 inner[2] = {}, norm[2] = {};
    for (; j < end; j += kGroup) {
      fetch_ahead(w_old + j);
      fetch_ahead(w_new + j);
      const Group before = load_group(w_old + j), after = load_group(w_new + j);
      F32 first = load_vector<F32>(squares + j), second = load_vector<F32>(squares + j + kLanes);
      add_products(before.first, after.first, first, inner[0], norm[0]);
      add_products(before.second, after.second, second, inner[1], norm[1]);
      store_vector(squares + j, first);
      store_vector(squares + j + kLanes, second);
    }
    scalars.inner.add(inner[0] + inner[1]);
    scalars.norm.add(norm[0] + norm[1]);
  }
  while (j < columns) {
    const std::int64_t left = columns - j < kLanes ? columns - j : kLanes;
    F32 inner = {}, norm = {}, squared = left < kLanes ? load(squares + j, left) : load(squares + j);
    const F32 before = left < kLanes ? load(w_old + j, left) : load(w_old + j);
    const F32 after = left < kLanes ? load(w_new + j, left) : load(w_new + j);
    add_products(before, after, squared, inner, norm);
    store_stored(squares + j, squared, left);
    scalars.inner.add(inner);
    scalars.norm.add(norm);
    j += left;
  }
}

template <typename T>
void column_scores(const void* w_old, std::int64_t old_stride, const void* w_new, std::int64_t new_stride,
                   std::int64_t rows, std::int64_t columns, float* running, float* squared_update, double* sums) {
  const T* before = static_cast<const T*>(w_old);
  const T* after = static_cast<const T*>(w_new);
  for (std::int64_t j = 0; j < columns; ++j) running[j] = 0;
  Scalars scalars = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    add_row(before + row * old_stride, after + row * new_stride, columns, running, scalars);
  }
  write_in_order(before, running, columns, squared_update);
  sums[0] = scalars.inner.sum();
  sums[1] = scalars.norm.sum();
}

}  // namespace

void fill_column_scores(Kernels& kernels) {
  kernels.column_scores[0] = column_scores<float>;
  kernels.column_scores[1] = column_scores<Float16>;
  kernels.column_scores[2] = column_scores<BFloat16>;
}

}  // namespace hpa::cpu::HPA_ISA
