// gram: G += sum over counted tokens of x^T x (HPA section 3), one triangle of 128 x 128 tiles computed, both written.
//
// 16-bit dtypes: mma.sync m16n8k16 with float32 accumulation for sm_80 and up. x is [tokens, in], so both operands are
// contiguous along the outputs; ldmatrix.trans turns them. float32: the same pipeline with float32 FMA, exact products
// and no splitting. The block that owns a tile adds it to G itself; with few tiles the tokens are split over blocks
// that write partial tiles, added in a fixed order by a second kernel. Tensor cores truncate into their accumulator, so
// sums leave the registers at least every 8192 tokens. Emulated on the CPU only; not yet run on a GPU
// (docs/kernels.md).
#include <type_traits>

#include "cuda/check.cuh"
#include "cuda/gram_sm90.cuh"
#include "cuda/gram_tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_pipeline.cuh"
#include "hpa/gram.h"

namespace hpa::cuda {
namespace {

// How the work is cut, from the sizes alone.
struct Cut {
  std::int64_t tiles, splits, tokens_per_split;
};

Cut cut_of(std::int64_t tokens, std::int64_t columns) {
  Cut cut{tiles_of(columns), 1, tokens};
  const std::int64_t wanted = wanted_splits(cut.tiles, tokens);
  if (wanted <= 1) return cut;
  cut.tokens_per_split = round_up<std::int64_t>(ceil_div(tokens, wanted), 32);
  cut.splits = ceil_div(tokens, cut.tokens_per_split);
  return cut;
}

struct Gram {
  const std::uint8_t* token_mask;  // [tokens] or null
  float* gram;                     // [in, in]
  float* parts;                    // [splits, tiles, 128, 128], null without splitting
  std::int64_t x_stride, gram_stride, tokens, in, tokens_per_split;
};

// 16-bit dtypes: 4 warps as 2 x 2, each 64 x 64 of the tile.
template <class T>
struct TensorTile {
  static constexpr int kThreads = 128;
  float sums[4][8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add(const T* p, const T* q) {
    using Layout = StageLayout<T>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int matrix = lane / 8, matrix_row = lane % 8;
    // ldmatrix.trans wants, in registers 0..3 of a: (m, k) = (0, 0), (8, 0), (0, 8), (8, 8); of two b: (k, n) = (0, 0),
    // (8, 0), (0, 8), (8, 8). 16 rows further the permutation is the same, so that one address serves every k.
    ptx::SharedAddress a_address[4], b_address[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int a_chunk = (warp / 2) * 8 + i * 2 + matrix % 2, b_chunk = (warp % 2) * 8 + i * 2 + matrix / 2;
      a_address[i] = ptx::shared_address(p) + 2 * Layout::offset((matrix / 2) * 8 + matrix_row, a_chunk);
      b_address[i] = ptx::shared_address(q) + 2 * Layout::offset((matrix % 2) * 8 + matrix_row, b_chunk);
    }
#pragma unroll
    for (int k = 0; k < Layout::kRows; k += 16) {
      std::uint32_t a[4][4], b[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) ptx::ldmatrix_x4_trans(a[m], a_address[m] + k * kTile * 2);
#pragma unroll
      for (int n = 0; n < 4; ++n) ptx::ldmatrix_x4_trans(b[n], b_address[n] + k * kTile * 2);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if constexpr (std::is_same_v<T, BFloat16>) {
            ptx::mma_m16n8k16_bf16(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          } else {
            ptx::mma_m16n8k16_f16(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  // This thread's elements by number: where the first lies in the tile, and how far from it the others.
  static constexpr int kElements = 128;
  static constexpr int kGroup = 16;
  static __device__ __forceinline__ int first_row() { return threadIdx.x / (2 * kWarp) * 64 + threadIdx.x % kWarp / 4; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / kWarp % 2 * 64 + threadIdx.x % 4 * 2; }
  static __host__ __device__ constexpr int row_offset(int e) { return e / 32 * 16 + e / 2 % 2 * 8; }
  static __host__ __device__ constexpr int column_offset(int e) { return e / 4 % 8 * 8 + e % 2; }
  __device__ __forceinline__ float value_of(int e) const { return sums[e / 32][e / 4 % 8][e % 4]; }
};

struct FloatTile : ScalarTile<float> {
  static constexpr int kElements = kSide * kSide;
  static constexpr int kGroup = 8;
  static __device__ __forceinline__ int first_row() { return row(0); }
  static __device__ __forceinline__ int first_column() { return column(0); }
  static __host__ __device__ constexpr int row_offset(int e) { return e / kSide % 4 + e / kSide / 4 * 64; }
  static __host__ __device__ constexpr int column_offset(int e) { return e % kSide % 4 + e % kSide / 4 * 64; }
  __device__ __forceinline__ float value_of(int e) const { return sums[e / kSide][e % kSide]; }
};

template <class T>
struct TileFor {
  using type = TensorTile<T>;
};
template <>
struct TileFor<float> {
  using type = FloatTile;
};

// blockIdx.x: the tile; blockIdx.y: the split.
template <class T, bool kVectorized>
__global__ void __launch_bounds__(TileFor<T>::type::kThreads, 2) add_tiles(const T* x, Gram g) {  // x [tokens, in]
  using Tile = typename TileFor<T>::type;
  HPA_DYNAMIC_SHARED(memory);
  const TilePlace place = triangle_place(blockIdx.x);
  const std::int64_t first_row = static_cast<std::int64_t>(place.row) * kTile;
  const std::int64_t first_column = static_cast<std::int64_t>(place.column) * kTile;
  const Panel<T> panel{x, g.x_stride, g.in, g.token_mask};
  const std::int64_t begin = blockIdx.y * g.tokens_per_split;
  const std::int64_t end = smaller(g.tokens, begin + g.tokens_per_split);

  Tile tile;
  for (std::int64_t from = begin; from < end; from += kFlushTokens) {
    tile.clear();
    run_stages<Tile::kThreads, kVectorized>(panel, first_row, first_column, reinterpret_cast<T*>(memory), from,
                                            smaller(end, from + kFlushTokens),
                                            [&](const T* p, const T* q) { tile.add(p, q); });
    if (g.parts == nullptr) {
      add_to_gram(tile, g.gram, ptx::opaque(g.gram_stride), g.in, ptx::opaque(first_row), ptx::opaque(first_column));
    } else {
      const std::int64_t part = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
      add_to_part(tile, g.parts, part, from == begin);
    }
  }
}

// Adds the partial tiles to G: a block takes 32 x 32 of a tile and turns it in shared memory, so that both places are
// written row by row. blockIdx.x: the tile; blockIdx.y: its part.
constexpr int kPart = 32;
constexpr int kPartsPerSide = kTile / kPart;

__global__ void __launch_bounds__(256)
    add_parts(const float* parts, std::int64_t splits, float* gram, std::int64_t gram_stride, std::int64_t in) {
  HPA_SHARED(turned, float[kPart][kPart + 1]);
  const TilePlace place = triangle_place(blockIdx.x);
  const int part_row = blockIdx.y / kPartsPerSide * kPart, part_column = blockIdx.y % kPartsPerSide * kPart;
  const int lane = threadIdx.x % kPart;
  const std::int64_t first_row = static_cast<std::int64_t>(place.row) * kTile + part_row;
  const std::int64_t first_column = static_cast<std::int64_t>(place.column) * kTile + part_column;
  for (int r = threadIdx.x / kPart; r < kPart; r += 256 / kPart) {
    const float* const source =
        parts + static_cast<std::int64_t>(blockIdx.x) * kTileElements + (part_row + r) * kTile + part_column + lane;
    float total = 0.0f;
    for (std::int64_t split = 0; split < splits; ++split) total += source[split * gridDim.x * kTileElements];
    turned[r][lane] = total;
    const std::int64_t row = first_row + r, column = first_column + lane;
    if (row < in && column <= row) gram[row * gram_stride + column] += total;
  }
  __syncthreads();
  for (int c = threadIdx.x / kPart; c < kPart; c += 256 / kPart) {
    const std::int64_t row = first_row + lane, column = first_column + c;
    if (row < in && column < row) gram[column * gram_stride + row] += turned[lane][c];
  }
}

// mma_sync for one sample that is not empty.
Status accumulate(const ConstMatrix& x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride,
                  void* workspace, Stream stream) {
  const Cut cut = cut_of(x.rows, x.columns);
  if (cut.splits > 1) HPA_REQUIRE_WORKSPACE(workspace);
  const Gram g{token_mask,
               gram,
               cut.splits > 1 ? static_cast<float*>(workspace) : nullptr,
               x.row_stride,
               gram_stride,
               x.rows,
               x.columns,
               cut.tokens_per_split};
  const Status multiplied = with_dtype(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool vectorized = rows_aligned16(x) && x.columns * sizeof(T) % 16 == 0;
    return with_bool(vectorized, [&](auto flag) {
      return launch(add_tiles<T, decltype(flag)::value>, grid_of(cut.tiles, cut.splits), TileFor<T>::type::kThreads,
                    kPipelineBytes, stream, static_cast<const T*>(x.data), g);
    });
  });
  if (!multiplied.ok() || cut.splits <= 1) return multiplied;
  return add_gram_parts(g.parts, cut.splits, cut.tiles, gram, gram_stride, x.columns, stream);
}

// Calls use(samples, count) for runs of samples that are not empty, none longer than one launch of wgmma takes.
template <class Use>
Status for_each_group(const GramSample* samples, std::int64_t count, Use&& use) {
  std::int64_t next = 0;
  while (next < count) {
    GramSample group[kSamplesPerLaunch];
    std::int64_t size = 0;
    for (; next < count && size < kSamplesPerLaunch; ++next) {
      if (samples[next].x.rows > 0 && samples[next].x.columns > 0) group[size++] = samples[next];
    }
    if (size > 0) HPA_RETURN_UNLESS_OK(use(group, size));
  }
  return {};
}

}  // namespace

Status add_gram_parts(const float* parts, std::int64_t splits, std::int64_t tiles, float* gram,
                      std::int64_t gram_stride, std::int64_t in, Stream stream) {
  return launch(add_parts, grid_of(tiles, kPartsPerSide * kPartsPerSide), 256, 0, stream, parts, splits, gram,
                gram_stride, in);
}

std::size_t gram_workspace_bytes(ConstMatrix x, GramKernel kernel) {
  const GramSample sample{x, nullptr};
  return gram_list_workspace_bytes(&sample, 1, kernel);
}

Status gram_accumulate(ConstMatrix x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride,
                       void* workspace, Stream stream, GramKernel kernel) {
  const GramSample sample{x, token_mask};
  return gram_accumulate_list(&sample, 1, gram, gram_stride, workspace, stream, kernel);
}

GramKernel gram_kernel_of(const GramSample* samples, std::int64_t count, GramKernel wanted) {
  return wanted == GramKernel::wgmma && wgmma_takes(samples, count) ? GramKernel::wgmma : GramKernel::mma_sync;
}

std::size_t gram_list_workspace_bytes(const GramSample* samples, std::int64_t count, GramKernel kernel) {
  std::size_t bytes = 0;
  (void)for_each_group(samples, count, [&](const GramSample* group, std::int64_t size) {
    // The alignment of x, which only the call itself sees, may give the samples to mma_sync after all.
    if (kernel == GramKernel::wgmma) bytes = larger(bytes, wgmma_workspace_bytes(group, size));
    for (std::int64_t s = 0; s < size; ++s) {
      const Cut cut = cut_of(group[s].x.rows, group[s].x.columns);
      bytes = larger(bytes, part_bytes(cut.splits, cut.tiles));
    }
    return Status{};
  });
  return bytes;
}

Status gram_accumulate_list(const GramSample* samples, std::int64_t count, float* gram, std::int64_t gram_stride,
                            void* workspace, Stream stream, GramKernel kernel) {
  HPA_REQUIRE(count >= 0, "count: must not be negative");
  HPA_REQUIRE(samples != nullptr || count == 0, "samples: must not be null");
  HPA_REQUIRE(kernel == GramKernel::mma_sync || kernel == GramKernel::wgmma, "kernel: must be mma_sync or wgmma");
  for (std::int64_t s = 0; s < count; ++s) {
    HPA_RETURN_UNLESS_OK(check_gram(samples[s].x, gram, gram_stride));
    HPA_REQUIRE(samples[s].x.columns == samples[0].x.columns && samples[s].x.dtype == samples[0].x.dtype,
                "samples: must have one dtype and one number of columns");
    HPA_REQUIRE(samples[s].x.columns <= kMaximumColumns && tiles_of(samples[s].x.columns) <= kMaximumGrid,
                "x: too many columns");
  }
  if (kernel == GramKernel::wgmma) HPA_RETURN_UNLESS_OK(wgmma_available());
  return for_each_group(samples, count, [&](const GramSample* group, std::int64_t size) {
    if (gram_kernel_of(group, size, kernel) == GramKernel::wgmma) {
      return wgmma_accumulate(group, size, gram, gram_stride, workspace, stream);
    }
    for (std::int64_t s = 0; s < size; ++s) {
      HPA_RETURN_UNLESS_OK(accumulate(group[s].x, group[s].token_mask, gram, gram_stride, workspace, stream));
    }
    return Status{};
  });
}

}  // namespace hpa::cuda
