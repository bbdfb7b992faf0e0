// Twins of csrc/cuda/ptx.cuh after the PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point type",
// "ldmatrix", "cp.async" and "cvt". Products accumulate in float64 and round once, where tensor cores truncate.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hpa::cuda::ptx {

inline float float_of_half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline std::uint16_t half_of_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the next power rounds up to infinity
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
  const int step = std::max(exponent - 11, -24);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -step)));  // ties to even
  if (units < 1024) return static_cast<std::uint16_t>(sign | units);                 // subnormal: step is -24
  // units may have rounded up to 2048: the carry moves into the exponent by itself.
  return static_cast<std::uint16_t>(sign | (((step + 25) << 10) + (units - 1024)));
}

inline std::uint16_t bfloat_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline std::uint32_t halves_of_floats(float low, float high) {
  return half_of_float(low) | static_cast<std::uint32_t>(half_of_float(high)) << 16;
}
inline std::uint32_t bfloats_of_floats(float low, float high) {
  return bfloat_of_float(low) | static_cast<std::uint32_t>(bfloat_of_float(high)) << 16;
}

inline float float_of_bfloat(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

struct MmaLane {
  float* d;
  std::uint32_t a[4], b[2];
};

template <float (*kToFloat)(std::uint16_t)>
void mma_warp(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& own = *static_cast<const MmaLane*>(lanes[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a0..a7: row group + 8 for i in {2,3,6,7}; column + 8 for i >= 4
      const int row = group + ((i / 2) % 2 == 1 ? 8 : 0);
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = kToFloat(static_cast<std::uint16_t>(own.a[i / 2] >> (16 * (i & 1))));
    }
    for (int i = 0; i < 4; ++i) {  // b0..b3: row + 8 for i >= 2; column group
      b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] =
          kToFloat(static_cast<std::uint16_t>(own.b[i / 2] >> (16 * (i & 1))));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaLane& own = *static_cast<MmaLane*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {  // c0..c3: row group + 8 for i >= 2; columns 2 in_group + {0, 1}
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = (lane % 4) * 2 + (i & 1);
      double sum = own.d[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      own.d[i] = static_cast<float>(sum);
    }
  }
}

inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MmaLane lane{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  hpa_emulation::warp_collective(&lane, mma_warp<float_of_bfloat>);
}

inline void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MmaLane lane{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  hpa_emulation::warp_collective(&lane, mma_warp<float_of_half>);
}

struct LdmatrixLane {
  const void* row;
  std::uint32_t* r;
};

inline void ldmatrix_x4_trans_warp(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const void* row = static_cast<LdmatrixLane*>(lanes[matrix * 8 + 2 * (lane % 4) + e])->row;
        std::memcpy(&pair[e], static_cast<const std::uint16_t*>(row) + lane / 4, 2);
      }
      static_cast<LdmatrixLane*>(lanes[lane])->r[matrix] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
    }
  }
}

using SharedAddress = std::uintptr_t;
inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }

inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], SharedAddress row) {
  if (row % 16 != 0) std::abort();
  LdmatrixLane lane{reinterpret_cast<const void*>(row), r};
  hpa_emulation::warp_collective(&lane, ldmatrix_x4_trans_warp);
}

inline void cp_async_16(SharedAddress shared, const void* global, bool keep) {
  hpa_emulation::copy_async(reinterpret_cast<void*>(shared), global, keep ? 16 : 0);
}
inline void cp_async_commit() { hpa_emulation::copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  hpa_emulation::copy_async_wait(kPending);
}

template <class Value>
Value opaque(Value value) {
  return value;
}

}  // namespace hpa::cuda::ptx
