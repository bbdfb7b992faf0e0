// inverse_diagonal: the diagonal of (H + damping mean(diag H) I)^-1 for a batch of symmetric matrices.
//
// A = D^-1/2 (H + delta I) D^-1/2 has unit diagonal and A = L L^T; [H^-1]_jj is the squared norm of column j of
// M = L^-1, over D_jj. The factorisation and the inversion run together, as elimination on [A; I] by panels of kPanel
// rows, in one lower triangle C: right of the panel it holds what is left of A, left of it what has gathered for M.
// For panel p, with R the panel's finished rows [kPanel, size]:
//   factor_panel   C_pp = L_pp L_pp^T, R_p = L_pp^-1, in the registers of one block
//   finish_panel   R_j = L_pp^-1 C_pj: for j < p rows of M, whose squares join the norms; for j > p the transpose of
//   L_jp update         C_ij = (j = p ? 0 : C_ij) - R_i^T R_j for all i > p, j <= i
// so M is never stored, and everything is 2/3 size^3 operations in 3 launches a panel. A matrix that fails is left
// alone from there on. Emulated on the CPU only; not yet run on a GPU (docs/kernels.md).
#include <cmath>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tile_pipeline.cuh"
#include "hpa/inverse_diagonal.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
constexpr int kPanel = StageLayout<T>::kTile;  // 128 in float32, 64 in float64

// One matrix's workspace, and where it starts: C, R and L_pp^-T in T; scales and norms in float64; then the state.
struct State {
  std::int32_t failed_minor;
  float smallest_pivot;
};

template <class T>
struct Work {
  unsigned char* base;
  std::int64_t size, padded, bytes;  // padded: size rounded up to whole panels

  __host__ __device__ std::int64_t matrix_elements() const { return padded * padded; }
  __device__ T* matrix(std::int64_t b) const { return reinterpret_cast<T*>(base + b * bytes); }  // [padded, padded]
  __device__ T* rows(std::int64_t b) const { return matrix(b) + matrix_elements(); }             // [kPanel, padded]
  __device__ T* inverse(std::int64_t b) const { return rows(b) + kPanel<T> * padded; }           // [kPanel, kPanel]
  __device__ double* scales(std::int64_t b) const {                                              // [padded]
    return reinterpret_cast<double*>(inverse(b) + kPanel<T> * kPanel<T>);
  }
  __device__ double* norms(std::int64_t b) const { return scales(b) + padded; }  // [padded]
  __device__ State* state(std::int64_t b) const { return reinterpret_cast<State*>(norms(b) + padded); }
};

template <class T>
Work<T> work_of(std::int64_t size) {
  Work<T> work{nullptr, size, round_up<std::int64_t>(size, kPanel<T>), 0};
  work.bytes = static_cast<std::int64_t>(sizeof(T)) *
                   (work.matrix_elements() + kPanel<T> * work.padded +
                    std::int64_t{kPanel<T>} * kPanel<T>)+static_cast<std::int64_t>(sizeof(double)) *
                   2 * work.padded +
               256;
  work.bytes = round_up<std::int64_t>(work.bytes, 256);
  return work;
}

// blockIdx.x: the matrix. The scales D_jj^-1/2 and a fresh state. Where D_jj is not positive, minor j + 1 cannot be
// either: the scale is then the sign of D_jj, for scale_matrix to leave to the factorisation to find.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare(MatrixBatch h, double damping, Work<T> work) {
  HPA_SHARED(scratch, double[kThreads / kWarp]);
  HPA_SHARED(shared_delta, double);
  const std::int64_t b = blockIdx.x;
  const float* const matrix = h.data + b * h.batch_stride;
  double sum = 0.0;
  for (std::int64_t j = threadIdx.x; j < h.size; j += kThreads)
    sum += static_cast<double>(matrix[j * h.row_stride + j]);
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) {
    shared_delta = damping * (sum / static_cast<double>(h.size));
    *work.state(b) = State{0, 1.0f};
  }
  __syncthreads();
  for (std::int64_t j = threadIdx.x; j < work.padded; j += kThreads) {
    const double diagonal = j < h.size ? static_cast<double>(matrix[j * h.row_stride + j]) + shared_delta : 1.0;
    work.scales(b)[j] = diagonal > 0.0 ? 1.0 / sqrt(diagonal) : (diagonal < 0.0 ? -1.0 : 0.0);
    work.norms(b)[j] = 0.0;
  }
}

// A into C, 32 x 32 elements of the lower triangle of blocks at a time; what lies past size is the identity. The upper
// half of a block on the diagonal of panels is read too, so those are written in full, mirrored.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_matrix(MatrixBatch h, Work<T> work) {
  HPA_SHARED(turned, T[32][33]);
  const std::int64_t b = blockIdx.y;
  const TilePlace place = triangle_place(blockIdx.x);
  const float* const matrix = h.data + b * h.batch_stride;
  const double* const scales = work.scales(b);
  T* const target = work.matrix(b);
  const int lane = threadIdx.x % 32;
  const std::int64_t first_row = static_cast<std::int64_t>(place.row) * 32;
  const std::int64_t first_column = static_cast<std::int64_t>(place.column) * 32;
  bool finite = true;
  for (int r = threadIdx.x / 32; r < 32; r += kThreads / 32) {
    const std::int64_t row = first_row + r, column = first_column + lane;
    T value = row == column ? T(1) : T(0);
    if (row < h.size && column <= row) {
      const float element = matrix[row * h.row_stride + column];
      finite = finite && is_finite(element);
      const double row_scale = scales[row], column_scale = scales[column];
      if (row == column) {
        value = row_scale > 0.0 ? T(1) : static_cast<T>(row_scale);
      } else {
        const bool positive = row_scale > 0.0 && column_scale > 0.0;
        value = positive ? static_cast<T>(static_cast<double>(element) * row_scale * column_scale) : T(0);
      }
    }
    turned[r][lane] = value;
    if (column <= row) target[row * work.padded + column] = value;
  }
  if (!finite) atomicMin(&work.state(b)->failed_minor, -1);
  __syncthreads();
  if (first_row / kPanel<T> != first_column / kPanel<T>) return;
  for (int c = threadIdx.x / 32; c < 32; c += kThreads / 32) {
    const std::int64_t row = first_row + lane, column = first_column + c;
    if (column < row) target[column * work.padded + row] = turned[lane][c];
  }
}

// blockIdx.x: the matrix. Elimination on the [kPanel, kPanel] block held in registers, thread (y, x) owning rows y + 16
// r and columns x + 16 c. Step s leaves row s of M in place: columns up to s hold M, those beyond hold A.
template <class T>
__global__ void __launch_bounds__(kThreads) factor_panel(Work<T> work, std::int64_t panel) {
  constexpr int kSide = kPanel<T> / 16;
  HPA_SHARED(pivot_rows, T[2][kPanel<T>]);
  HPA_SHARED(pivot_columns, T[2][kPanel<T>]);
  const std::int64_t b = blockIdx.x;
  if (work.state(b)->failed_minor != 0) return;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const std::int64_t first = panel * kPanel<T>;
  const T* const block = work.matrix(b) + first * work.padded + first;

  T own[kSide][kSide];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
#pragma unroll
    for (int c = 0; c < kSide; ++c) own[r][c] = block[(y + 16 * r) * work.padded + x + 16 * c];
  }
  T smallest = T(1);
#pragma unroll
  for (int outer = 0; outer < kSide; ++outer) {
    for (int inner = 0; inner < 16; ++inner) {
      const int step = outer * 16 + inner;
      T* const pivot_row = pivot_rows[inner % 2];
      T* const pivot_column = pivot_columns[inner % 2];
      if (y == inner) {
#pragma unroll
        for (int c = 0; c < kSide; ++c) pivot_row[x + 16 * c] = own[outer][c];
      }
      if (x == inner) {
#pragma unroll
        for (int r = 0; r < kSide; ++r) pivot_column[y + 16 * r] = own[r][outer];
      }
      __syncthreads();  // one a step: the next step writes the other half
      const T pivot = pivot_row[step];
      if (!(pivot > T(0))) {  // NaN too; the same in every thread
        if (threadIdx.x == 0)
          *work.state(b) = State{static_cast<std::int32_t>(first + step + 1), static_cast<float>(pivot)};
        return;
      }
      smallest = smaller(smallest, pivot);
      const T root = T(1) / sqrt(pivot);
      T row_values[kSide];  // row `step` of [M | L^T]
#pragma unroll
      for (int c = 0; c < kSide; ++c) row_values[c] = (c == outer && x == inner ? T(1) : pivot_row[x + 16 * c]) * root;
#pragma unroll
      for (int r = outer; r < kSide; ++r) {
        const T factor = pivot_column[y + 16 * r] * root;
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          if (r > outer || y > inner) {
            own[r][c] = (c == outer && x == inner ? T(0) : own[r][c]) - factor * row_values[c];
          } else if (y == inner) {
            own[r][c] = row_values[c];
          }
        }
      }
    }
  }
  T* const rows = work.rows(b) + first;
  T* const inverse = work.inverse(b);
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const int row = y + 16 * r, column = x + 16 * c;
      const T value = column <= row ? own[r][c] : T(0);
      rows[row * work.padded + column] = value;
      inverse[column * kPanel<T> + row] = value;  // transposed
    }
  }
  if (threadIdx.x == 0) {
    State* const state = work.state(b);
    state->smallest_pivot = smaller(state->smallest_pivot, static_cast<float>(smallest));
  }
}

// blockIdx.x: 32 columns of R; blockIdx.y: the matrix. A warp computes kPanel / 8 rows of them, a lane one column.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) finish_panel(Work<T> work, std::int64_t panel) {
  constexpr int kColumns = 32;
  constexpr int kDepth = 32;
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kRows = kPanel<T> / kWarps;
  HPA_SHARED(inverse_tile, T[kDepth][kPanel<T>]);
  HPA_SHARED(source_tile, T[kDepth][kColumns + 1]);
  HPA_SHARED(squares, T[kWarps][kColumns]);
  const std::int64_t b = blockIdx.y;
  if (work.state(b)->failed_minor != 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t first = panel * kPanel<T>;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumns;
  const T* const matrix = work.matrix(b);
  T* const rows = work.rows(b);
  const bool left = column < first;
  const bool inside = !left && column < first + kPanel<T>;

  T sums[kRows];
  if (inside) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = rows[(warp * kRows + r) * work.padded + column + lane];
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = T(0);
    for (int depth = 0; depth < kPanel<T>; depth += kDepth) {
      for (int e = threadIdx.x; e < kDepth * kPanel<T>; e += kThreads) {
        inverse_tile[e / kPanel<T>][e % kPanel<T>] = work.inverse(b)[depth * kPanel<T> + e];
      }
      for (int r = warp; r < 32; r += kWarps) {
        if (left) {
          source_tile[r][lane] = matrix[(first + depth + r) * work.padded + column + lane];
        } else {
          source_tile[lane][r] = matrix[(column + r) * work.padded + first + depth + lane];
        }
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        const T value = source_tile[k][lane];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += inverse_tile[k][warp * kRows + r] * value;
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[(warp * kRows + r) * work.padded + column + lane] = sums[r];
  }
  if (!left && !inside) return;  // L, not M
  T square = T(0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) square += sums[r] * sums[r];
  squares[warp][lane] = square;
  __syncthreads();
  if (warp == 0) {
    double total = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += static_cast<double>(squares[w][lane]);
    work.norms(b)[column + lane] += total;
  }
}

// blockIdx.x: the tile of the lower triangle below the panel; blockIdx.y: the matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) update(Work<T> work, std::int64_t panel) {
  HPA_DYNAMIC_SHARED(memory);
  const std::int64_t b = blockIdx.y;
  if (work.state(b)->failed_minor != 0) return;
  const TilePlace place = triangle_place(blockIdx.x + (panel + 1) * (panel + 2) / 2);
  const std::int64_t first_row = static_cast<std::int64_t>(place.row) * kPanel<T>;
  const std::int64_t first_column = static_cast<std::int64_t>(place.column) * kPanel<T>;
  const Panel<T> rows{work.rows(b), work.padded, work.padded, nullptr};

  ScalarTile<T> tile;
  tile.clear();
  run_stages<kThreads, true>(rows, first_row, first_column, reinterpret_cast<T*>(memory), 0, kPanel<T>,
                             [&](const T* p, const T* q) { tile.add(p, q); });

  T* const target = work.matrix(b) + first_row * work.padded + first_column;
  const bool fresh = place.column == panel;
  constexpr int kSide = ScalarTile<T>::kSide;
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    T before[kSide];
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      before[c] = fresh ? T(0) : target[tile.row(r) * work.padded + tile.column(c)];
    }
#pragma unroll
    for (int c = 0; c < kSide; ++c) target[tile.row(r) * work.padded + tile.column(c)] = before[c] - tile.sums[r][c];
  }
}

// blockIdx.x: 256 columns; blockIdx.y: the matrix.
template <class T>
__global__ void __launch_bounds__(kThreads) finish(InverseDiagonalResult result, Work<T> work) {
  const std::int64_t b = blockIdx.y;
  const State state = *work.state(b);
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j == 0) {
    result.failed_minor[b] = state.failed_minor;
    result.smallest_pivot[b] = state.failed_minor < 0 ? not_a_number() : state.smallest_pivot;
  }
  if (j >= work.size) return;
  const double scale = work.scales(b)[j];
  result.diagonal[b * work.size + j] =
      state.failed_minor != 0 ? not_a_number() : static_cast<float>(work.norms(b)[j] * scale * scale);
}

template <class T>
Status run(MatrixBatch h, double damping, InverseDiagonalResult result, void* workspace, Stream stream) {
  Work<T> work = work_of<T>(h.size);
  work.base = static_cast<unsigned char*>(workspace);
  const std::int64_t panels = work.padded / kPanel<T>;
  const std::int64_t scale_side = work.padded / 32;
  Status status = launch(prepare<T>, grid_of(h.batch), kThreads, 0, stream, h, damping, work);
  if (!status.ok()) return status;
  status = launch(scale_matrix<T>, grid_of(scale_side * (scale_side + 1) / 2, h.batch), kThreads, 0, stream, h, work);
  if (!status.ok()) return status;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    status = launch(factor_panel<T>, grid_of(h.batch), kThreads, 0, stream, work, panel);
    if (!status.ok()) return status;
    status = launch(finish_panel<T>, grid_of(work.padded / 32, h.batch), kThreads, 0, stream, work, panel);
    if (!status.ok()) return status;
    const std::int64_t tiles = panels * (panels + 1) / 2 - (panel + 1) * (panel + 2) / 2;
    if (tiles == 0) continue;
    status = launch(update<T>, grid_of(tiles, h.batch), kThreads, kPipelineBytes, stream, work, panel);
    if (!status.ok()) return status;
  }
  return launch(finish<T>, grid_of(ceil_div<std::int64_t>(h.size, kThreads), h.batch), kThreads, 0, stream, result,
                work);
}

constexpr std::int64_t kMaximumSize = 1 << 18;

template <class T>
Status run_all(MatrixBatch h, double damping, InverseDiagonalResult result, void* workspace, Stream stream) {
  // The second dimension of a grid counts matrices, and it is limited.
  for (std::int64_t first = 0; first < h.batch; first += kMaximumGridYZ) {
    MatrixBatch some = h;
    some.data += first * h.batch_stride;
    some.batch = smaller(h.batch - first, kMaximumGridYZ);
    const InverseDiagonalResult place{result.diagonal + first * h.size, result.failed_minor + first,
                                      result.smallest_pivot + first};
    const Status status =
        run<T>(some, damping, place, static_cast<unsigned char*>(workspace) + first * work_of<T>(h.size).bytes, stream);
    if (!status.ok()) return status;
  }
  return {};
}

__global__ void __launch_bounds__(kThreads) finish_empty(InverseDiagonalResult result, std::int64_t batch) {
  const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= batch) return;
  result.failed_minor[b] = 0;
  result.smallest_pivot[b] = 1.0f;
}

}  // namespace

std::size_t inverse_diagonal_workspace_bytes(std::int64_t batch, std::int64_t size, Precision precision) {
  if (batch <= 0 || size <= 0 || size > kMaximumSize) return 0;
  const std::int64_t bytes = precision == Precision::float64 ? work_of<double>(size).bytes : work_of<float>(size).bytes;
  return static_cast<std::size_t>(batch) * static_cast<std::size_t>(bytes);
}

Status inverse_diagonal(MatrixBatch h, double damping, Precision precision, InverseDiagonalResult result,
                        void* workspace, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_inverse_diagonal(h, damping, precision, result));
  HPA_REQUIRE(h.size <= kMaximumSize, "size: must be at most 2^18 on CUDA");
  if (h.batch == 0) return {};
  if (h.size == 0) {
    return launch(finish_empty, grid_of(ceil_div<std::int64_t>(h.batch, kThreads)), kThreads, 0, stream, result,
                  h.batch);
  }
  HPA_REQUIRE_WORKSPACE(workspace);
  return precision == Precision::float32 ? run_all<float>(h, damping, result, workspace, stream)
                                         : run_all<double>(h, damping, result, workspace, stream);
}

}  // namespace hpa::cuda
