// The tile instructions in plain C++, for csrc/cpu/simd/amx.h: what Intel's SDM volume 2 says of each, checks included.
// A use that a processor answers with an exception, or with numbers that mean nothing, is counted in amx_model::faults.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hpa::test::amx_model {

struct Tile {
  std::uint32_t words[16][16] = {};
  bool defined = false;
};
struct State {
  bool configured = false;
  Tile tiles[8];
};
inline thread_local State state;
inline int faults = 0, configured = 0, released = 0, products = 0;

inline Tile& tile(int index) {
  if (!state.configured || index < 0 || index > 7) ++faults;
  return state.tiles[index & 7];
}

// Denormals count as zero, in operands and in results.
inline float flushed(float value) { return std::abs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }
inline float high_half(std::uint32_t word) {
  const std::uint32_t bits = word & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

}  // namespace hpa::test::amx_model

namespace hpa::cpu::HPA_ISA {
namespace {

inline void tile_configure(const TileConfiguration& configuration) {
  using namespace hpa::test::amx_model;
  // The kernel under test uses whole tiles only; the model has no others.
  bool whole = configuration.palette == 1 && configuration.start_row == 0;
  for (const std::uint8_t byte : configuration.reserved) whole = whole && byte == 0;
  for (int i = 0; i < 16; ++i) {
    whole = whole && configuration.rows[i] == (i < 8 ? 16 : 0) && configuration.row_bytes[i] == (i < 8 ? 64 : 0);
  }
  if (!whole || reinterpret_cast<std::uintptr_t>(&configuration) % 64 != 0) ++faults;
  state = {};
  state.configured = true;
  ++configured;
}

inline void tile_release() {
  hpa::test::amx_model::state = {};
  ++hpa::test::amx_model::released;
}

template <int kTile>
void tile_zero() {
  hpa::test::amx_model::tile(kTile) = {{}, true};
}

template <int kTile>
void tile_load(const void* first_row, std::int64_t stride) {
  auto& target = hpa::test::amx_model::tile(kTile);
  for (int row = 0; row < 16; ++row) {
    std::memcpy(target.words[row], static_cast<const char*>(first_row) + row * stride, 64);
  }
  target.defined = true;
}

template <int kTile>
void tile_store(void* first_row, std::int64_t stride) {
  const auto& source = hpa::test::amx_model::tile(kTile);
  if (!source.defined) ++hpa::test::amx_model::faults;
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(first_row) + row * stride, source.words[row], 64);
  }
}

template <int kSum, int kLeft, int kRight>
void tile_multiply_add() {
  using namespace hpa::test::amx_model;
  Tile &sum = tile(kSum), &left = tile(kLeft), &right = tile(kRight);
  if (kSum == kLeft || kSum == kRight || kLeft == kRight) ++faults;
  if (!sum.defined || !left.defined || !right.defined) ++faults;
  ++products;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float value;
      std::memcpy(&value, &sum.words[m][n], sizeof value);
      for (int k = 0; k < 16; ++k) {
        const std::uint32_t a = left.words[m][k], b = right.words[k][n];
        value = flushed(std::fma(high_half(a << 16), high_half(b << 16), value));
        value = flushed(std::fma(high_half(a), high_half(b), value));
      }
      std::memcpy(&sum.words[m][n], &value, sizeof value);
    }
  }
}

}  // namespace
}  // namespace hpa::cpu::HPA_ISA
