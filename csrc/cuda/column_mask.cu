// column_mask: exactly the k highest scores of each row, ties to the lower index, for a list of layers in one launch.
// One block per row: a radix select finds the k-th largest key in four passes of eight bits over integer counts, then
// one ordered pass writes the mask. Everything is counted in integers, so the order of the atomics cannot show.
// Emulated on the CPU only; not yet run on a GPU (docs/kernels.md).
#include "cuda/check.cuh"
#include "cuda/item_table.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "hpa/column_mask.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;

// Keys that order as the scores do: NaN lowest, -0 equal to +0.
__device__ __forceinline__ std::uint32_t ordered_key(float score) {
  std::uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;  // below the key of -infinity, 0x007fffff
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u) != 0 ? ~bits : (bits | 0x80000000u);
}

struct Selection {
  std::uint32_t prefix;  // the digits of the k-th largest key found so far
  unsigned remaining;    // how many to take among the keys with this prefix
};

struct Scores {
  const float* scores;           // [rows, columns]
  const std::uint8_t* eligible;  // [rows, columns] or null
  const std::int64_t* counts;    // [rows] or null
  std::uint8_t* mask;            // [rows, columns]
  std::int64_t count;            // of every row where counts is null
  std::int32_t rows, columns;
};

template <int kItems>
__global__ void __launch_bounds__(kThreads) select_highest(HPA_GRID_CONSTANT(ItemTable<Scores, kItems>) table) {
  HPA_SHARED(histogram, unsigned[kDigits]);
  HPA_SHARED(selection, Selection);
  HPA_SHARED(tie_counts, unsigned[2][kWarps]);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int index = item_of(table, blockIdx.x);
  const Scores& item = table.items[index];
  const std::int64_t columns = item.columns;
  const std::int64_t row = blockIdx.x - table.first_block[index];
  const float* const scores = item.scores + row * columns;
  const std::uint8_t* const eligible = item.eligible == nullptr ? nullptr : item.eligible + row * columns;
  std::uint8_t* const mask = item.mask + row * columns;
  std::uint32_t prefix = 0;
  unsigned remaining = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) histogram[digit] = 0;
    __syncthreads();
    const std::uint32_t known = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for (std::int64_t column = threadIdx.x; column < columns; column += kThreads) {
      if (eligible != nullptr && eligible[column] == 0) continue;
      const std::uint32_t key = ordered_key(scores[column]);
      if ((key & known) == prefix) atomicAdd(&histogram[(key >> shift) & 0xffu], 1u);
    }
    __syncthreads();
    if (warp == 0) {
      // Lane l holds the counts of eight digits, the highest digits in lane 0.
      const int top = kDigits - 1 - lane * 8;
      unsigned own = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) own += histogram[top - i];
      unsigned through = own;  // keys in this lane's digits and higher ones
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const unsigned lower_lane = __shfl_up_sync(0xffffffffu, through, distance);
        if (lane >= distance) through += lower_lane;
      }
      if (shift == 24) {
        const unsigned total = __shfl_sync(0xffffffffu, through, kWarp - 1);
        const std::int64_t wanted = item.counts == nullptr ? item.count : item.counts[row];
        remaining = wanted <= 0 ? 0u : (wanted >= total ? total : static_cast<unsigned>(wanted));
        if (remaining == 0 && lane == 0) selection = {0u, 0u};
      }
      const unsigned above_lane = through - own;
      if (above_lane < remaining && remaining <= through) {  // true in one lane, or in none when remaining is 0
        unsigned above = above_lane;
        int digit = top;
        while (above + histogram[digit] < remaining) above += histogram[digit--];
        selection = {prefix | (static_cast<std::uint32_t>(digit) << shift), remaining - above};
      }
    }
    __syncthreads();
    prefix = selection.prefix;
    remaining = selection.remaining;
    if (remaining == 0) break;  // the same in every thread; only ever in the first pass
  }

  // Everything above the threshold is taken, and of the keys equal to it the first `remaining`.
  unsigned ties_before = 0;
  int parity = 0;
  for (std::int64_t start = 0; start < columns; start += kThreads, parity ^= 1) {
    const std::int64_t column = start + threadIdx.x;
    const bool candidate = column < columns && remaining > 0 && (eligible == nullptr || eligible[column] != 0);
    const std::uint32_t key = candidate ? ordered_key(scores[column]) : 0u;
    const bool tie = candidate && key == prefix;
    const unsigned ties = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) tie_counts[parity][warp] = __popc(ties);
    __syncthreads();
    unsigned rank = ties_before + __popc(ties & ((1u << lane) - 1u));
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const unsigned count = tie_counts[parity][w];
      if (w < warp) rank += count;
      ties_before += count;
    }
    if (column < columns) mask[column] = candidate && (key > prefix || (tie && rank < remaining)) ? 1 : 0;
  }
}

Scores scores_of(const ColumnMaskItem& item) {
  const auto& [scores, eligible, counts, mask, batch, columns] = item.arguments;
  return {
      scores, eligible, counts, mask, item.count, static_cast<std::int32_t>(batch), static_cast<std::int32_t>(columns)};
}

}  // namespace

Status column_mask_list(const ColumnMaskItem* items, std::int64_t count, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_list(items, count, check_column_mask));
  Scores scores[kManyItems];
  for (std::int64_t first = 0; first < count; first += kManyItems) {
    const int here = static_cast<int>(smaller<std::int64_t>(kManyItems, count - first));
    for (int i = 0; i < here; ++i) scores[i] = scores_of(items[first + i]);
    HPA_RETURN_UNLESS_OK(launch_items(
        scores, here, [](const Scores& item) { return std::int64_t{item.columns > 0 ? item.rows : 0}; },
        [&]<int kItems>(const ItemTable<Scores, kItems>& table, dim3 grid) {
          return launch(select_highest<kItems>, grid, kThreads, 0, stream, table);
        }));
  }
  return {};
}

Status column_mask(ColumnMaskArguments arguments, Stream stream) {
  HPA_RETURN_UNLESS_OK(check_column_mask(arguments));
  const ColumnMaskItem item = {arguments};
  return column_mask_list(&item, 1, stream);
}

}  // namespace hpa::cuda
