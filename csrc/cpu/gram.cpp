#include "hpa/gram.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/checks.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace hpa::cpu {
namespace {

// Products of this many tokens are summed in registers before they are added to a tile.
constexpr std::int64_t kDepthTokens = 256;
// Packed tokens are bounded by this, and so is the number of tokens between two additions to the Gram.
constexpr std::int64_t kPackedBytes = std::int64_t{64} << 20;
// Packing tasks: long enough rows to read memory in order.
constexpr std::int64_t kPackTokens = 64, kPackPanels = 16;

// How one input type becomes panels, and panels a product. See Kernels for each.
template <typename Element>
struct Packing {
  std::int64_t tokens_per_element;
  std::int64_t step;  // the depth of a product is a multiple of this many elements
  void (*pack)(const void*, std::int64_t, const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, Element*,
               std::int64_t);
  void (*add_product)(std::int64_t, const Element*, const Element*, float*, std::int64_t);
  void (*arrange_left)(std::int64_t, Element*, Element*) = nullptr;
  void (*begin_products)() = nullptr;
  void (*end_products)() = nullptr;

  std::int64_t copies() const { return arrange_left != nullptr ? 2 : 1; }
};

// Packed columns: panel p is [depth][kPanel], and behind it, where the product wants one, the copy for its left side.
template <typename Element>
struct Panels {
  Element* data;
  std::int64_t depth, copies;

  std::int64_t stride() const { return copies * depth * kPanel; }
  Element* right(std::int64_t p, std::int64_t k) const { return data + p * stride() + k * kPanel; }
  Element* left(std::int64_t p, std::int64_t k) const { return right(p, k) + (copies - 1) * depth * kPanel; }
};

constexpr std::int64_t rounded_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// Adds the products of one tile of the lower triangle of G, panels [row, row_end) x [column, column_end), to `sums`.
template <typename Element>
void multiply_tile(const Packing<Element>& packing, const Panels<Element>& panels, std::int64_t row,
                   std::int64_t row_end, std::int64_t column, std::int64_t column_end, float* sums,
                   std::int64_t sums_stride) {
  const std::int64_t step = kDepthTokens / packing.tokens_per_element;
  if (packing.begin_products != nullptr) packing.begin_products();
  for (std::int64_t k = 0; k < panels.depth; k += step) {
    const std::int64_t count = std::min(step, panels.depth - k);
    for (std::int64_t q = column; q < column_end; ++q) {
      for (std::int64_t p = std::max(row, q); p < row_end; ++p) {
        packing.add_product(count, panels.left(p, k), panels.right(q, k),
                            sums + ((p - row) * sums_stride + (q - column)) * kPanel, sums_stride);
      }
    }
  }
  if (packing.end_products != nullptr) packing.end_products();
}

// The Gram is cut into tiles of a few panels; only tiles on or below the diagonal are computed, each by one task over
// all packed tokens, and every block is then added to both of its places. An element's sum is in the order of the
// tokens, whatever the tiles and threads, and the same above and below the diagonal.
template <typename Element>
Status accumulate(const ConstMatrix& x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride,
                  const Packing<Element>& packing) {
  const Kernels& loops = kernels();
  const std::int64_t columns = x.columns, panel_count = (columns + kPanel - 1) / kPanel;
  const std::int64_t bytes_per_token =
      packing.copies() * panel_count * kPanel * static_cast<std::int64_t>(sizeof(Element)) / packing.tokens_per_element;
  const std::int64_t longest =
      std::min(std::max(kPackedBytes / bytes_per_token / kDepthTokens, std::int64_t{2}) * kDepthTokens, x.rows);
  const std::int64_t tile = panel_count >= 24 ? 5 : 2;  // in panels: a tile and its operands fit the second-level cache
  const std::int64_t tiles = (panel_count + tile - 1) / tile, slots = slot_count();
  const auto depth_of = [&](std::int64_t tokens) {
    return rounded_up((tokens + packing.tokens_per_element - 1) / packing.tokens_per_element, packing.step);
  };
  Buffer<Element> packed(packing.copies() * panel_count * kPanel * depth_of(longest));
  Buffer<float> sums(slots * tile * tile * kPanel * kPanel);
  Buffer<std::int64_t> tokens(longest);
  if (!packed || !sums || !tokens) return kOutOfMemory;

  for (std::int64_t next = 0; next < x.rows;) {
    std::int64_t count = 0;
    for (; next < x.rows && count < longest; ++next) {
      if (token_mask == nullptr || token_mask[next] != 0) tokens[count++] = next;
    }
    if (count == 0) break;
    const Panels<Element> panels = {packed.data(), depth_of(count), packing.copies()};

    const std::int64_t column_tasks = (panel_count + kPackPanels - 1) / kPackPanels;
    const std::int64_t token_tasks = (count + kPackTokens - 1) / kPackTokens;
    parallel_for(column_tasks * token_tasks, [&](std::int64_t task) {
      const std::int64_t panel = task % column_tasks * kPackPanels, token = task / column_tasks * kPackTokens;
      const std::int64_t packed_tokens = std::min(kPackTokens, count - token), k = token / packing.tokens_per_element;
      packing.pack(x.data, x.row_stride, tokens.data() + token, packed_tokens, panel * kPanel,
                   std::min(kPackPanels * kPanel, columns - panel * kPanel), panels.right(panel, k), panels.stride());
      if (packing.arrange_left == nullptr) return;
      const std::int64_t elements = (packed_tokens + packing.tokens_per_element - 1) / packing.tokens_per_element;
      for (std::int64_t p = panel; p < std::min(panel + kPackPanels, panel_count); ++p) {
        packing.arrange_left(elements, panels.right(p, k), panels.left(p, k));
      }
    });

    parallel_for(tiles * (tiles + 1) / 2, slots, [&](std::int64_t task, std::int64_t slot) {
      std::int64_t tile_row = 0;
      while ((tile_row + 1) * (tile_row + 2) / 2 <= task) ++tile_row;
      const std::int64_t row = tile_row * tile, column = (task - tile_row * (tile_row + 1) / 2) * tile;
      const std::int64_t row_end = std::min(row + tile, panel_count), column_end = std::min(column + tile, panel_count);
      const std::int64_t stride = tile * kPanel;
      float* block = sums.data() + slot * stride * stride;
      std::fill(block, block + stride * stride, 0.0f);
      multiply_tile(packing, panels, row, row_end, column, column_end, block, stride);
      for (std::int64_t p = row; p < row_end; ++p) {
        for (std::int64_t q = column; q < column_end && q <= p; ++q) {
          const float* part = block + ((p - row) * stride + (q - column)) * kPanel;
          const std::int64_t i = p * kPanel, j = q * kPanel;
          const std::int64_t height = std::min(kPanel, columns - i), width = std::min(kPanel, columns - j);
          loops.add_block(part, stride, height, width, gram + i * gram_stride + j, gram_stride);
          if (p != q) loops.add_block_transposed(part, stride, height, width, gram + j * gram_stride + i, gram_stride);
        }
      }
    });
  }
  return {};
}

}  // namespace

Status gram_accumulate(ConstMatrix x, const std::uint8_t* token_mask, float* gram, std::int64_t gram_stride) {
  HPA_RETURN_UNLESS_OK(check_gram(x, gram, gram_stride));
  if (is_empty(x)) return {};
  const Kernels& loops = kernels();
  if (x.dtype == DType::bfloat16 && loops.add_pair_product != nullptr) {
    return accumulate<std::uint32_t>(x, token_mask, gram, gram_stride,
                                     {2, loops.pair_step, loops.pack_token_pairs, loops.add_pair_product,
                                      loops.arrange_left, loops.begin_products, loops.end_products});
  }
  return accumulate<float>(x, token_mask, gram, gram_stride,
                           {1, 1, loops.pack_tokens[static_cast<int>(x.dtype)], loops.add_product});
}

}  // namespace hpa::cpu
