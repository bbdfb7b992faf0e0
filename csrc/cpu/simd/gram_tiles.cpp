// The panel product of gram for bfloat16 on the tiles of AMX: 16 x 16 sums and 32 tokens an instruction.
//
// Not yet run on a processor that has AMX: off by default, see docs/kernels.md. tdpbf16ps rounds to nearest even and
// treats denormal inputs and results as zero whatever MXCSR says, as vdpbf16ps does.
#include "cpu/simd/amx.h"
#include "cpu/simd/kernels.h"

namespace hpa::cpu::HPA_ISA {
namespace {

constexpr std::int64_t kTile = 16;                // rows of a tile, and its 32-bit columns
constexpr std::int64_t kGroups = kPanel / kTile;  // tiles side by side in a panel
constexpr std::int64_t kTileWords = kTile * kTile;
constexpr std::int64_t kPanelBytes = kPanel * 4, kTileBytes = kTile * 4;

typedef std::uint32_t U32x4 __attribute__((vector_size(16)));

// out[i * kTile + k] = in[k * kPanel + i] for one tile.
void transpose_tile(const std::uint32_t* in, std::uint32_t* out) {
  for (std::int64_t i = 0; i < kTile; i += 4) {
    for (std::int64_t k = 0; k < kTile; k += 4) {
      F32x4 block[4];  // moved, never computed with
      HPA_UNROLL
      for (int n = 0; n < 4; ++n) block[n] = load_vector<F32x4>(in + (k + n) * kPanel + i);
      transpose(block[0], block[1], block[2], block[3]);
      HPA_UNROLL
      for (int n = 0; n < 4; ++n) store_vector(out + (i + n) * kTile + k, block[n]);
    }
  }
}

// What lies in a panel is what tdpbf16ps wants of its right operand. Of its left operand it wants 16 pairs of one
// column side by side: tiles [pairs / 16][3][16 columns][16 pairs]. Pairs that fill up the last tile are zeros in both.
void arrange_left(std::int64_t pairs, std::uint32_t* panel, std::uint32_t* left) {
  const std::int64_t padded = (pairs + kTile - 1) / kTile * kTile;
  for (std::int64_t i = pairs * kPanel; i < padded * kPanel; ++i) panel[i] = 0;
  for (std::int64_t k = 0; k < padded; k += kTile) {
    for (std::int64_t group = 0; group < kGroups; ++group) {
      transpose_tile(panel + k * kPanel + group * kTile, left + k * kPanel + group * kTileWords);
    }
  }
}

// Columns [0, 32) of the block: six sums, one left and one right tile. An operand is loaded 7 times for 6 products, so
// that loads stay below half of the products' time.
void multiply_two_columns(std::int64_t pairs, const std::uint32_t* left, const std::uint32_t* right, float* block) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>();
  for (std::int64_t k = 0; k < pairs; k += kTile) {
    const std::uint32_t *a = left + k * kPanel, *b = right + k * kPanel;
    tile_load<6>(a, kTileBytes);
    tile_load<7>(b, kPanelBytes);
    tile_multiply_add<0, 6, 7>();
    tile_load<7>(b + kTile, kPanelBytes);
    tile_multiply_add<1, 6, 7>();
    tile_load<6>(a + kTileWords, kTileBytes);
    tile_multiply_add<3, 6, 7>();
    tile_load<7>(b, kPanelBytes);
    tile_multiply_add<2, 6, 7>();
    tile_load<6>(a + 2 * kTileWords, kTileBytes);
    tile_multiply_add<4, 6, 7>();
    tile_load<7>(b + kTile, kPanelBytes);
    tile_multiply_add<5, 6, 7>();
  }
  constexpr std::int64_t kRows = kTile * kPanel;
  tile_store<0>(block, kPanelBytes);
  tile_store<1>(block + kTile, kPanelBytes);
  tile_store<2>(block + kRows, kPanelBytes);
  tile_store<3>(block + kRows + kTile, kPanelBytes);
  tile_store<4>(block + 2 * kRows, kPanelBytes);
  tile_store<5>(block + 2 * kRows + kTile, kPanelBytes);
}

// Columns [32, 48).
void multiply_last_column(std::int64_t pairs, const std::uint32_t* left, const std::uint32_t* right, float* block) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>();
  for (std::int64_t k = 0; k < pairs; k += kTile) {
    const std::uint32_t* a = left + k * kPanel;
    tile_load<7>(right + k * kPanel + 2 * kTile, kPanelBytes);
    tile_load<4>(a, kTileBytes);
    tile_multiply_add<0, 4, 7>();
    tile_load<5>(a + kTileWords, kTileBytes);
    tile_multiply_add<1, 5, 7>();
    tile_load<6>(a + 2 * kTileWords, kTileBytes);
    tile_multiply_add<2, 6, 7>();
  }
  tile_store<0>(block + 2 * kTile, kPanelBytes);
  tile_store<1>(block + kTile * kPanel + 2 * kTile, kPanelBytes);
  tile_store<2>(block + 2 * kTile * kPanel + 2 * kTile, kPanelBytes);
}

// The sums of one call pass through a block of their own: added up inside the tiles, those of 100,000 tokens would be
// one long sum, with its rounding.
void add_pair_product(std::int64_t pairs, const std::uint32_t* left, const std::uint32_t* right, float* c,
                      std::int64_t c_stride) {
  alignas(64) float block[kPanel * kPanel];
  multiply_two_columns(pairs, left, right, block);
  multiply_last_column(pairs, left, right, block);
  for (std::int64_t i = 0; i < kPanel; ++i) {
    for (std::int64_t j = 0; j < kPanel; j += kLanes) {
      float* out = c + i * c_stride + j;
      store_vector(out, load_vector<F32>(out) + load_vector<F32>(block + i * kPanel + j));
    }
  }
}

// All eight registers full: edges are zeros in the panels. The configuration is the thread's own, and is given back
// after each tile of the Gram, so that other code on the thread finds none and the kernel saves none.
void begin_products() {
  constexpr std::uint16_t b = kTileBytes;
  constexpr std::uint8_t r = kTile;
  static constexpr TileConfiguration full = {1, 0, {}, {b, b, b, b, b, b, b, b}, {r, r, r, r, r, r, r, r}};
  tile_configure(full);
}

void end_products() { tile_release(); }

}  // namespace

void fill_gram_tiles(Kernels& kernels) {
  kernels.pair_step = kTile;
  kernels.arrange_left = arrange_left;
  kernels.add_pair_product = add_pair_product;
  kernels.begin_products = begin_products;
  kernels.end_products = end_products;
}

}  // namespace hpa::cpu::HPA_ISA
