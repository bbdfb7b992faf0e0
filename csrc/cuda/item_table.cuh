// Lists of layers in one launch: a table of items that travels by value as a kernel parameter. Nothing is copied to the
// device beforehand and nothing allocated, so a list can be captured in a CUDA graph, which keeps the table.
#pragma once

#include <cstdint>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"

namespace hpa::cuda {

// Parameters may take 32,764 bytes since CUDA 12.1, 4,096 before. The small table serves the linears of a decoder layer
// and every single call, so that these do not carry the large one.
constexpr int kFewItems = 16;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyItems = 32;
constexpr std::size_t kParameterBytes = 4096;
#else
constexpr int kManyItems = 256;
constexpr std::size_t kParameterBytes = 32764;
#endif

// A parameter that the threads share; the emulator's must not copy it for each of them.
#ifdef HPA_CUDA_EMULATION
#define HPA_GRID_CONSTANT(...) const __VA_ARGS__&
#else
#define HPA_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#endif

template <class Item, int kItems>
struct ItemTable {
  int count;
  unsigned first_block[kItems];  // of each item, strictly increasing; the first is 0
  Item items[kItems];
};

// The item that `block` works for: the last one whose first block is not behind it. Uniform in a block; reads the
// parameter bank alone.
template <class Item, int kItems>
__device__ __forceinline__ int item_of(const ItemTable<Item, kItems>& table, unsigned block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int kItems, class Item, class Blocks, class Launch>
Status launch_tables(const Item* items, int count, Blocks&& blocks_of, Launch&& launch_table,
                     std::int64_t most_blocks) {
  static_assert(sizeof(ItemTable<Item, kItems>) <= kParameterBytes);
  ItemTable<Item, kItems> table{};
  std::int64_t total = 0;
  for (int i = 0; i <= count; ++i) {
    const std::int64_t blocks = i < count ? blocks_of(items[i]) : 0;
    if (table.count > 0 && (i == count || total + blocks > most_blocks)) {
      HPA_RETURN_UNLESS_OK(launch_table(table, grid_of(total)));
      table.count = 0;
      total = 0;
    }
    if (blocks == 0) continue;
    table.first_block[table.count] = static_cast<unsigned>(total);
    table.items[table.count++] = items[i];
    total += blocks;
  }
  return {};
}

// Calls launch_table(table, grid) for tables of all `count` items, at most kManyItems, that have blocks: once, unless
// there are more blocks than a grid holds. blocks_of(item) is at most most_blocks.
template <class Item, class Blocks, class Launch>
Status launch_items(const Item* items, int count, Blocks&& blocks_of, Launch&& launch_table,
                    std::int64_t most_blocks = kMaximumGrid) {
  if (count <= kFewItems) return launch_tables<kFewItems>(items, count, blocks_of, launch_table, most_blocks);
  return launch_tables<kManyItems>(items, count, blocks_of, launch_table, most_blocks);
}

// Calls function(TypeTag<element type>, BoolTag<vectorized>) inside a kernel that serves every kind of item; the branch
// is uniform in a block.
template <class Function>
__device__ __forceinline__ void in_row_kind(DType dtype, bool vectorized, Function&& function) {
  if (dtype == DType::bfloat16) {
    vectorized ? function(TypeTag<BFloat16>{}, BoolTag<true>{}) : function(TypeTag<BFloat16>{}, BoolTag<false>{});
  } else if (dtype == DType::float16) {
    vectorized ? function(TypeTag<Float16>{}, BoolTag<true>{}) : function(TypeTag<Float16>{}, BoolTag<false>{});
  } else {
    vectorized ? function(TypeTag<float>{}, BoolTag<true>{}) : function(TypeTag<float>{}, BoolTag<false>{});
  }
}

}  // namespace hpa::cuda
