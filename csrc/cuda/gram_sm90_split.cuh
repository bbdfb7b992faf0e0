// float32 for the kernel of gram_sm90_kernel.cuh: x = hi + mid + lo, three bfloat16 of 8 significant bits each, and of
// their nine products the six that a float32 sum can see. docs/kernels.md says why.
#pragma once

#include <cstdint>

#include "cuda/gram_sm90_kernel.cuh"
#include "cuda/numeric.cuh"

// What the planes of one chunk of tokens may take, as long as that is kLeastChunkTokens. The emulation tests lower it,
// to come by several chunks.
#ifndef HPA_GRAM_PLANE_BYTES
#define HPA_GRAM_PLANE_BYTES (std::int64_t{64} << 20)
#endif

namespace hpa::cuda::sm90 {

constexpr int kParts = 3;
// A flush is due earlier than for 16-bit x: after 1024 tokens the tensor cores' truncation is 1e-6 of the sum.
constexpr int kFloatFlushTokens = static_cast<int>(smaller<std::int64_t>(1024, kFlushTokens / 4));
constexpr std::int64_t kPlaneBytes = HPA_GRAM_PLANE_BYTES;
constexpr std::int64_t kLeastChunkTokens = 2 * kFloatFlushTokens;
static_assert(kFloatFlushTokens % kStageTokens == 0, "whole stages");

// planes: [hi, mid, lo][tokens, rounded up to whole stages][in, rounded up to 8] bfloat16, one matrix to the copies.
struct Planes {
  static constexpr int kFlushStages = kFloatFlushTokens / kStageTokens, kProducts = 6;

  CUtensorMap map;
  int rows;  // of one plane
};

// The first rows, in the matrix of all planes, of what product number `product` multiplies: the small ones first, while
// the sums, and with them what truncation takes away, are small. Products of 2^-25 and less are left out.
struct PlanePair {
  int left, right;
};
__host__ __device__ constexpr PlanePair plane_pair(int product) {
  constexpr int kHi = 0, kMid = 1, kLo = 2;
  return product == 0   ? PlanePair{kLo, kHi}
         : product == 1 ? PlanePair{kHi, kLo}
         : product == 2 ? PlanePair{kMid, kMid}
         : product == 3 ? PlanePair{kMid, kHi}
         : product == 4 ? PlanePair{kHi, kMid}
                        : PlanePair{kHi, kHi};
}

// The copying thread.
__device__ __forceinline__ void produce(const Planes& planes, const Job& job, const Ring& ring) {
  Place place;
  for_each_turn<Planes>(job, [&](const Turn& turn, int) {
    const TilePlace tile = banded_place(turn.tile, job.side);
#pragma unroll 1
    for (int product = 0; product < Planes::kProducts; ++product) {
      const PlanePair pair = plane_pair(product);
      const int left = pair.left * planes.rows, right = pair.right * planes.rows;
      for (int stage = turn.begin; stage < turn.end; ++stage) {
        const int token = stage * kStageTokens;
        copy_stage(ring, place, &planes.map, tile, one_panel<Planes>(tile), left + token, right + token);
      }
    }
  });
}

// x = parts[0] + parts[1] + parts[2], exactly, for |x| of 2^-110 and more: what a part leaves is exact in float32, and
// 24 bits are three times 8. A finite x has finite parts; any other has one that is not, and so no finite product.
__device__ __forceinline__ void split(float x, float (&parts)[kParts]) {
  const auto rounded = [](float value) {
    BFloat16 bits;
    from_float(value, bits);
    return to_float(bits);
  };
  parts[0] = rounded(x);
  if (!is_finite(parts[0])) parts[0] = __uint_as_float(__float_as_uint(x) & 0xffff0000u);  // beyond bfloat16's range
  const float left = __fsub_rn(x, parts[0]);
  parts[1] = rounded(left);
  parts[2] = __fsub_rn(left, parts[1]);
}

// What split_float reads and where it writes: `rows` tokens, and zeros for those up to `rows_written`.
struct Splitting {
  const float* x;            // [rows, columns]
  const std::uint8_t* mask;  // [rows] or null; tokens that do not count become zeros and are not read
  BFloat16* planes;          // the first token's row in the first plane
  std::int64_t x_stride, rows, rows_written, columns;
  std::int64_t pitch, plane_size;  // elements between rows, and between planes
};

constexpr int kSplitThreads = 256;

// A thread takes eight neighbouring columns of a token.
template <bool kVectorized>
__global__ void __launch_bounds__(kSplitThreads) split_float(Splitting job) {
  const std::int64_t eights = job.pitch / 8;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  const std::int64_t row = item / eights, column = (item - row * eights) * 8;
  if (row >= job.rows_written) return;
  const bool counts = row < job.rows && (job.mask == nullptr || job.mask[row] != 0);
  const Eight<float> values =
      load_eight<kVectorized>(job.x + row * job.x_stride + column, counts ? eight_count(column, job.columns) : 0);
  float parts[kParts][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float own[kParts];
    split(values.value(i), own);
#pragma unroll
    for (int p = 0; p < kParts; ++p) parts[p][i] = own[p];
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    store_eight<true>(job.planes + p * job.plane_size + row * job.pitch + column, 8,
                      Eight<BFloat16>::choose(0, zero_eight<BFloat16>(), parts[p]));
  }
}

}  // namespace hpa::cuda::sm90
