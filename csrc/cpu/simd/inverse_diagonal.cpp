// Inner loops of inverse_diagonal on 48 x 48 blocks, in float32 and float64.
#include "cpu/simd/product.h"

namespace hpa::cpu::HPA_ISA {
namespace {

template <typename T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

constexpr std::uint32_t kExponent = 0x7f800000u;  // all ones: Inf or NaN

typedef std::uint32_t U32x4 __attribute__((vector_size(16)));

HPA_INLINE void store_scaled(F32x4 v, const float* row_scale, float column_scale, float* out) {
  store_vector(out, v * load_vector<F32x4>(row_scale) * column_scale);
}
HPA_INLINE void store_scaled(F32x4 v, const double* row_scale, double column_scale, double* out) {
  HPA_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = static_cast<double>(v[i]) * row_scale[i] * column_scale;
}

template <typename T>
bool pack_scaled(const float* h, std::int64_t row_stride, std::int64_t rows, std::int64_t columns, const T* row_scale,
                 const T* column_scale, T* out) {
  U32x4 bad = {};
  for (std::int64_t r = 0; r < kPanel; r += 4) {
    // Rows behind the end repeat the last one; their scale is zero.
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = h + (r + i < rows ? r + i : rows - 1) * row_stride;
    for (std::int64_t k = 0; k < columns; k += 4) {
      F32x4 block[4];
      HPA_UNROLL
      for (int i = 0; i < 4; ++i) {
        block[i] = load_vector<F32x4>(row[i] + k);
        bad |= (U32x4)(((U32x4)block[i] & kExponent) == kExponent);
      }
      transpose(block[0], block[1], block[2], block[3]);
      HPA_UNROLL
      for (int i = 0; i < 4; ++i) {
        store_scaled(block[i], row_scale + r, column_scale[k + i], out + (k + i) * kPanel + r);
      }
    }
  }
  return (bad[0] | bad[1] | bad[2] | bad[3]) == 0;
}

template <typename T>
void subtract_product(std::int64_t depth, const T* a, const T* b, T* c) {
  for (std::int64_t j = 0; j < kPanel; j += kTileVectors * kWidth<T>) {
    for (std::int64_t i = 0; i < kPanel; i += kTileRows) {
      Vector<T> sum[kTileRows][kTileVectors];
      product_tile<T, kTileRows, kTileVectors>(depth, a + i, kPanel, 1, b + j, sum);
      HPA_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
          T* out = c + (i + row) * kPanel + j + v * kWidth<T>;
          store_vector(out, load_vector<Vector<T>>(out) - sum[row][v]);
        }
      }
    }
  }
}

HPA_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
HPA_INLINE double square_root(double v) { return __builtin_sqrt(v); }

template <typename T>
std::int32_t factor(T* l, T* reciprocals, T* smallest_pivot) {
  for (std::int64_t c = 0; c < kPanel; ++c) {
    T* column = l + c * kPanel;
    const T pivot = column[c];
    if (!(pivot >= *smallest_pivot)) *smallest_pivot = pivot;
    if (!(pivot > 0)) return static_cast<std::int32_t>(c + 1);
    const T root = square_root(pivot);
    reciprocals[c] = 1 / root;
    // Vectors start at the one that holds row c: what they write above the diagonal is never read.
    const std::int64_t start = c / kWidth<T> * kWidth<T>;
    for (std::int64_t r = start; r < kPanel; r += kWidth<T>) {
      store_vector(column + r, load_vector<Vector<T>>(column + r) * reciprocals[c]);
    }
    column[c] = root;
    for (std::int64_t later = c + 1; later < kPanel; ++later) {
      const Vector<T> factor_of_column = broadcast(-column[later]);
      T* target = l + later * kPanel;
      for (std::int64_t r = later / kWidth<T> * kWidth<T>; r < kPanel; r += kWidth<T>) {
        store_vector(target + r, multiply_add(factor_of_column, load_vector<Vector<T>>(column + r),
                                              load_vector<Vector<T>>(target + r)));
      }
    }
  }
  return 0;
}

template <typename T>
void solve(const T* l, const T* reciprocals, T* x) {
  for (std::int64_t j = 0; j < kPanel; j += kTileVectors * kWidth<T>) {
    for (std::int64_t c = 0; c < kPanel; c += kTileRows) {
      Vector<T> value[kTileRows][kTileVectors];
      product_tile<T, kTileRows, kTileVectors>(c, l + c, kPanel, 1, x + j, value);
      HPA_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
          value[row][v] = load_vector<Vector<T>>(x + (c + row) * kPanel + j + v * kWidth<T>) - value[row][v];
        }
        HPA_UNROLL
        for (int k = 0; k < row; ++k) {
          const Vector<T> left = broadcast(-l[(c + k) * kPanel + c + row]);
          HPA_UNROLL
          for (int v = 0; v < kTileVectors; ++v) value[row][v] = multiply_add(left, value[k][v], value[row][v]);
        }
        HPA_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
          value[row][v] *= reciprocals[c + row];
          store_vector(x + (c + row) * kPanel + j + v * kWidth<T>, value[row][v]);
        }
      }
    }
  }
}

template <typename T>
void column_norms(std::int64_t rows, const T* y, double* sums) {
  constexpr std::int64_t kBlock = 64;  // rows summed in T before they are added in float64
  for (std::int64_t j = 0; j < kPanel; ++j) sums[j] = 0;
  for (std::int64_t j = 0; j < kPanel; j += kWidth<T>) {
    for (std::int64_t first = 0; first < rows; first += kBlock) {
      const std::int64_t last = first + kBlock < rows ? first + kBlock : rows;
      Vector<T> sum = {};
      for (std::int64_t row = first; row < last; ++row) {
        const Vector<T> v = load_vector<Vector<T>>(y + row * kPanel + j);
        sum = multiply_add(v, v, sum);
      }
      for (int lane = 0; lane < kWidth<T>; ++lane) sums[j + lane] += static_cast<double>(sum[lane]);
    }
  }
}

template <typename T>
void fill(FactorKernels<T>& kernels) {
  kernels.pack_scaled = pack_scaled<T>;
  kernels.subtract_product = subtract_product<T>;
  kernels.factor = factor<T>;
  kernels.solve = solve<T>;
  kernels.column_norms = column_norms<T>;
}

}  // namespace

void fill_inverse_diagonal(Kernels& kernels) {
  fill(kernels.factor_f32);
  fill(kernels.factor_f64);
}

}  // namespace hpa::cpu::HPA_ISA
