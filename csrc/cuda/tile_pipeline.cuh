// The product P^T Q of two panels stored row by row ([depth, columns], both operands contiguous along the outputs), by
// tiles: stages of some rows of both panels travel through shared memory with cp.async while earlier ones are used.
// gram (P = Q = x) and the updates of inverse_diagonal have this form.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"

namespace hpa::cuda {

constexpr int kStages = 3;
constexpr int kOperandBytes = 8192;                          // of one operand in one stage
constexpr int kPipelineBytes = kStages * 2 * kOperandBytes;  // 48 KB: what a kernel gets without asking

// How one tile's stage of one operand lies in shared memory: kRows rows of kTile elements. Rows of 256 bytes (16-bit
// dtypes, read by ldmatrix) have their 16-byte chunks permuted by the row, so that eight rows meet different banks.
template <class T>
struct StageLayout {
  static constexpr int kTile = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kRows = kOperandBytes / (kTile * static_cast<int>(sizeof(T)));
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kChunks = kTile / kChunk;                   // per row
  static constexpr bool kPermuted = sizeof(T) == 2;

  // Where the 16-byte chunk `chunk` of row `row` starts, in elements.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kTile + (kPermuted ? (chunk ^ (row & 7)) : chunk) * kChunk;
  }
};

// A panel: rows of `columns` elements, of which the tile takes those from first_column on. A row counts where row_mask
// is null or not zero.
template <class T>
struct Panel {
  const T* data;
  std::int64_t row_stride;
  std::int64_t columns;
  const std::uint8_t* row_mask;
};

// How a thread's 16-byte chunks lie in a stage: one chunk in each of kPasses rows, kRowsAtOnce rows apart.
template <class T, int kThreads>
struct StageShare {
  using Layout = StageLayout<T>;
  static constexpr int kRowsAtOnce = kThreads / Layout::kChunks;
  static constexpr int kPasses = Layout::kRows / kRowsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0 && Layout::kRows % kRowsAtOnce == 0, "the permutation repeats every 8 rows");
  static __device__ __forceinline__ int chunk() { return threadIdx.x % Layout::kChunks; }
  static __device__ __forceinline__ int row() { return threadIdx.x / Layout::kChunks; }
};

// Which of this thread's rows count, stage after stage. Values are fetched one stage ahead of their use, so that
// nothing waits for the mask.
template <class T, int kThreads>
struct RowCounts {
  using Share = StageShare<T, kThreads>;
  const std::uint8_t* mask;  // at this thread's first row of the next stage
  int rows_left;             // from there on
  unsigned counts[Share::kPasses];

  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int pass = 0; pass < Share::kPasses; ++pass) {
      const int row = pass * Share::kRowsAtOnce;
      counts[pass] = row < rows_left ? (mask == nullptr ? 1u : mask[row]) : 0u;
    }
    if (mask != nullptr) mask += Share::Layout::kRows;
    rows_left -= Share::Layout::kRows;
  }
};

// Brings one operand's stages in, one after the other. Rows that do not count and columns that do not exist become
// zeros without being read; the address of such a copy may lie outside the panel. Copies of 16 bytes are whole or
// nothing, so kVectorized asks for a number of columns that is a multiple of a chunk.
template <class T, int kThreads, bool kVectorized>
struct StageLoader {
  using Share = StageShare<T, kThreads>;
  using Layout = StageLayout<T>;
  const T* next;      // this thread's chunk in its first row of the next stage
  std::int64_t step;  // elements between its rows
  int elements;       // how many of the chunk's elements exist
  int target;         // where its first chunk goes

  __device__ __forceinline__ StageLoader(const Panel<T>& panel, std::int64_t first_column, std::int64_t first_row) {
    const std::int64_t column = first_column + Share::chunk() * Layout::kChunk;
    const std::int64_t left = panel.columns - column;
    elements = left >= Layout::kChunk ? Layout::kChunk : (left > 0 && !kVectorized ? static_cast<int>(left) : 0);
    next = panel.data + (first_row + Share::row()) * panel.row_stride + column;
    step = Share::kRowsAtOnce * panel.row_stride;
    target = Layout::offset(Share::row(), Share::chunk());
  }

  __device__ __forceinline__ void load(T* stage, const unsigned (&counts)[Share::kPasses]) {
    const ptx::SharedAddress address = ptx::shared_address(stage + target);
#pragma unroll
    for (int pass = 0; pass < Share::kPasses; ++pass) {
      constexpr int kStep = Share::kRowsAtOnce * Layout::kTile;
      if constexpr (kVectorized) {
        ptx::cp_async_16(address + pass * kStep * static_cast<int>(sizeof(T)), next,
                         counts[pass] != 0 && elements != 0);
      } else {
        T* const to = stage + target + pass * kStep;
        const int here = counts[pass] != 0 ? elements : 0;
#pragma unroll
        for (int e = 0; e < Layout::kChunk; ++e) to[e] = e < here ? next[e] : T{};
      }
      next += step;
    }
  }
};

// Runs rows [begin, end) of a panel's tiles at columns p and q through `use(p_stage, q_stage)`, all stages in order;
// where p == q there is one stage for both. Every thread of the block takes part; shared memory is free again at
// return.
template <int kThreads, bool kVectorized, class T, class Use>
__device__ __forceinline__ void run_stages(const Panel<T>& panel, std::int64_t p, std::int64_t q, T* shared,
                                           std::int64_t begin, std::int64_t end, Use&& use) {
  using Share = StageShare<T, kThreads>;
  constexpr int kRows = StageLayout<T>::kRows;
  constexpr int kOperand = kOperandBytes / static_cast<int>(sizeof(T));
  const int depth = static_cast<int>(end - begin);
  const int stages = ceil_div(depth, kRows);
  const bool same = p == q;
  StageLoader<T, kThreads, kVectorized> p_loader(panel, p, begin), q_loader(panel, q, begin);
  RowCounts<T, kThreads> rows;
  rows.mask = panel.row_mask == nullptr ? nullptr : panel.row_mask + begin + Share::row();
  rows.rows_left = depth - Share::row();
  const auto load = [&](int stage, int slot) {
    if (stage < stages) {
      T* const memory = shared + slot * 2 * kOperand;
      p_loader.load(memory, rows.counts);
      if (!same) q_loader.load(memory + kOperand, rows.counts);
      rows.fetch();
    }
    ptx::cp_async_commit();  // also when empty, so that the count of groups tells the stage
  };
  rows.fetch();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, s);
  int slot = 0, next_slot = kStages - 1;
  for (int stage = 0; stage < stages; ++stage) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and the slot of the one before is free for the next load
    load(stage + kStages - 1, next_slot);
    const T* const memory = shared + slot * 2 * kOperand;
    use(memory, same ? memory : memory + kOperand);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    next_slot = next_slot + 1 == kStages ? 0 : next_slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// One thread's share of a tile in scalar arithmetic (float: 8 x 8 of 128 x 128, double: 4 x 4 of 64 x 64), 256 threads
// as 16 x 16: two groups of kChunk rows and columns, half a tile apart, so that shared memory is read 16 bytes at a
// time without bank conflicts.
template <class T>
struct ScalarTile {
  using Layout = StageLayout<T>;
  static constexpr int kThreads = 256;
  static constexpr int kSide = 2 * Layout::kChunk;
  T sums[kSide][kSide];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
#pragma unroll
      for (int c = 0; c < kSide; ++c) sums[r][c] = T(0);
    }
  }
  static __device__ __forceinline__ int place(int thread, int i) {
    return (i / Layout::kChunk) * (Layout::kTile / 2) + thread * Layout::kChunk + i % Layout::kChunk;
  }
  static __device__ __forceinline__ int row(int i) { return place(threadIdx.x / 16, i); }
  static __device__ __forceinline__ int column(int i) { return place(threadIdx.x % 16, i); }

  __device__ __forceinline__ void add(const T* p, const T* q) {
    struct alignas(16) Vector {
      T values[Layout::kChunk];
    };
#pragma unroll
    for (int k = 0; k < Layout::kRows; ++k) {
      Vector left[2], right[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[half] = *reinterpret_cast<const Vector*>(p + k * Layout::kTile + row(half * Layout::kChunk));
        right[half] = *reinterpret_cast<const Vector*>(q + k * Layout::kTile + column(half * Layout::kChunk));
      }
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          sums[r][c] += left[r / Layout::kChunk].values[r % Layout::kChunk] *
                        right[c / Layout::kChunk].values[c % Layout::kChunk];
        }
      }
    }
  }
};

// The tile (row, column), column <= row, at place `index` of the lower triangle read row by row.
struct TilePlace {
  int row, column;
};

__device__ __forceinline__ TilePlace triangle_place(std::int64_t index) {
  std::int64_t row = static_cast<std::int64_t>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {static_cast<int>(row), static_cast<int>(index - row * (row + 1) / 2)};
}

}  // namespace hpa::cuda
