// The device side of gram_sm90.cu: the kernel that multiplies. A block stays on its multiprocessor and takes every
// gridDim-th tile. One thread copies; two warpgroups compute, each a tile of its own, in turns: while one adds its sums
// to G, the other has the tensor cores. Both operands are x itself, [tokens, in], contiguous along the outputs, which
// wgmma reads from shared memory as it lies. docs/kernels.md says why it is cut this way.
#pragma once

#include <cstdint>

#include "cuda/gram_order.cuh"
#include "cuda/gram_sm90.cuh"
#include "cuda/gram_tile.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace hpa::cuda::sm90 {

constexpr int kStageTokens = 64;
constexpr int kAtomColumns = 64;  // 128 bytes: the widest row that the swizzle takes
constexpr int kAtomBytes = kStageTokens * kAtomColumns * 2;
constexpr int kPanelBytes = kTile / kAtomColumns * kAtomBytes;  // of one operand in one stage: 16 KB
constexpr int kStageBytes = 2 * kPanelBytes;
constexpr int kRing = 6;       // stages in shared memory
constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kSwizzleAlignment = 1024;
constexpr int kSharedBytes = kSwizzleAlignment + kRing * kStageBytes + (2 * kRing + kConsumers) * 8;
static_assert(kSharedBytes <= 227 * 1024, "what a block can have on sm_90");

constexpr int kWarpgroup = 128;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 65536 in all, in steps of 8
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536, "registers of a block");

// What is multiplied is a Source: x as it lies (Samples), or the parts of a float32 x (Planes, gram_sm90_split.cuh).
// kFlushStages: stages between two flushes; kProducts: how often each stage's tokens are gone through between them.

// A kernel parameter: tensor maps must lie in constant or parameter memory. Sample s owns the stages from
// first_stage[s] up to first_stage[s + 1].
struct Samples {
  static constexpr int kFlushStages = static_cast<int>(kFlushTokens / kStageTokens), kProducts = 1;

  CUtensorMap maps[kSamplesPerLaunch];
  const std::uint8_t* masks[kSamplesPerLaunch];  // [tokens] or null
  int tokens[kSamplesPerLaunch];
  int first_stage[kSamplesPerLaunch + 1];
};

struct Job {
  float* gram;   // [in, in]
  float* parts;  // [splits, tiles, 128, 128], null without splitting
  std::int64_t gram_stride;
  int in, side;  // side: tiles along a side of G
  int tiles, splits, stages, stages_per_split;
};

// One warpgroup's tile: two wgmma of 64 rows. Warp w holds rows 16 w to 16 w + 15 of each.
struct WarpgroupTile {
  float sums[2][64];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[half][i] = 0.0f;
    }
  }

  static constexpr int kElements = 128;
  static constexpr int kGroup = 16;
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
  }
  static __device__ __forceinline__ int first_column() { return threadIdx.x % 4 * 2; }
  static __host__ __device__ constexpr int row_offset(int e) { return e / 64 * 64 + e / 2 % 2 * 8; }
  static __host__ __device__ constexpr int column_offset(int e) { return e % 64 / 4 * 8 + e % 2; }
  __device__ __forceinline__ float value_of(int e) const { return sums[e / 64][e % 64]; }
};
static_assert(sizeof(Samples) + sizeof(Job) <= 4096, "a launch's parameters");

// An operand for wgmma, contiguous along the outputs: rows of 64 outputs (128 bytes, swizzled), 8 tokens every 1024
// bytes (the stride offset), 64 outputs every atom (the leading offset). The address is a multiple of 1024.
__device__ __forceinline__ std::uint64_t operand(ptx::SharedAddress address) {
  constexpr std::uint64_t kSwizzle128 = 1, kLeading = kAtomBytes, kStride = 8 * 128;
  return (address & 0x3ffffu) >> 4 | kLeading >> 4 << 16 | kStride >> 4 << 32 | kSwizzle128 << 62;
}

// Where the copying thread and the warpgroups are in the ring of stages; all of them count the same.
struct Place {
  int slot = 0;
  unsigned phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kRing) {
      slot = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int stages) {
    const int reached = slot + stages;
    slot = reached % kRing;
    phase ^= reached / kRing & 1;
  }
};

// The ring: full[i] ends a phase when stage i is there, empty[i] when the four warps that use it are done. turn[w] ends
// one when warpgroup w may begin its next turn: when the other one has seen all stages of its own arrive. A wait tells
// phases apart by their parity alone, so that one for a stage several rounds of the ring ahead would pass at once.
struct Ring {
  ptx::SharedAddress stages, barriers;

  __device__ __forceinline__ explicit Ring(const unsigned char* memory) {
    stages = ptx::opaque((ptx::shared_address(memory) + kSwizzleAlignment - 1) / kSwizzleAlignment * kSwizzleAlignment);
    barriers = stages + kRing * kStageBytes;
  }
  __device__ __forceinline__ ptx::SharedAddress stage(int slot) const { return stages + slot * kStageBytes; }
  __device__ __forceinline__ ptx::SharedAddress full(int slot) const { return barriers + slot * 8; }
  __device__ __forceinline__ ptx::SharedAddress empty(int slot) const { return barriers + (kRing + slot) * 8; }
  __device__ __forceinline__ ptx::SharedAddress turn(int consumer) const {
    return barriers + (2 * kRing + consumer) * 8;
  }
};

// Which sample a stage belongs to, and its first token there; stages are asked for in order.
struct Cursor {
  int sample = 0;

  __device__ __forceinline__ int first_token(const Samples& samples, int stage) {
    while (stage >= samples.first_stage[sample + 1]) ++sample;
    return (stage - samples.first_stage[sample]) * kStageTokens;
  }
};

// What one warpgroup does in its turn: stages [begin, end) of a tile, all of them kProducts times, `chunk` many flushes
// into its split.
struct Turn {
  int tile, split, begin, end, chunk;
};

// Calls use(turn, consumer) for all turns of this block, in the order of their stages in the ring. The warpgroups
// alternate strictly; where one has no work left, its turn has no stages.
template <class Source, class Use>
__device__ __forceinline__ void for_each_turn(const Job& job, Use&& use) {
  const int items = job.tiles * job.splits;
  const int blocks = static_cast<int>(gridDim.x);
  for (int first = static_cast<int>(blockIdx.x); first < items; first += kConsumers * blocks) {
    for (int chunk = 0; chunk * Source::kFlushStages < job.stages_per_split; ++chunk) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const int item = first + consumer * blocks, split = item / job.tiles;
        const int begin = split * job.stages_per_split + chunk * Source::kFlushStages;
        const int split_end = smaller(job.stages, (split + 1) * job.stages_per_split);
        const int end = item < items ? larger(begin, smaller(split_end, begin + Source::kFlushStages)) : begin;
        use(Turn{item - split * job.tiles, split, begin, end, chunk}, consumer);
      }
    }
  }
}

// Copies two panels, or one where they are the same, into the ring as its next stage: the tile's rows of x from
// left_token on, and its columns from right_token on.
__device__ __forceinline__ void copy_stage(const Ring& ring, Place& place, const CUtensorMap* map,
                                           const TilePlace& tile, bool same, int left_token, int right_token) {
  const ptx::SharedAddress full = ring.full(place.slot);
  ptx::barrier_wait(ring.empty(place.slot), place.phase ^ 1);
  ptx::barrier_arrive_expecting(full, same ? kPanelBytes : kStageBytes);
  ptx::SharedAddress target = ring.stage(place.slot);
#pragma unroll
  for (int atom = 0; atom < 2; ++atom, target += kAtomBytes) {
    ptx::copy_box(target, map, full, tile.row * kTile + atom * kAtomColumns, left_token);
  }
  if (!same) {
#pragma unroll
    for (int atom = 0; atom < 2; ++atom, target += kAtomBytes) {
      ptx::copy_box(target, map, full, tile.column * kTile + atom * kAtomColumns, right_token);
    }
  }
  place.advance();
}

// Whether both panels of a tile are the same in every stage, and so there once.
template <class Source>
__device__ __forceinline__ bool one_panel(const TilePlace& tile) {
  return Source::kProducts == 1 && tile.row == tile.column;
}

// The copying thread.
__device__ __forceinline__ void produce(const Samples& samples, const Job& job, const Ring& ring) {
  Place place;
  for_each_turn<Samples>(job, [&](const Turn& turn, int) {
    const TilePlace tile = banded_place(turn.tile, job.side);
    Cursor cursor;
    for (int stage = turn.begin; stage < turn.end; ++stage) {
      const int token = cursor.first_token(samples, stage);
      copy_stage(ring, place, &samples.maps[cursor.sample], tile, one_panel<Samples>(tile), token, token);
    }
  });
}

// Which of a stage's tokens count: a lane asks for two of them, one stage ahead of their use.
struct StageMask {
  unsigned own[2];

  __device__ __forceinline__ void fetch(const Samples& samples, Cursor& cursor, int stage, int end) {
    own[0] = own[1] = 1;
    if (stage >= end) return;
    const int first = cursor.first_token(samples, stage);
    const std::uint8_t* const mask = samples.masks[cursor.sample];
    if (mask == nullptr) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first + i * kWarp + threadIdx.x % kWarp;
      if (token < samples.tokens[cursor.sample]) own[i] = mask[token];  // others are zeros anyway
    }
  }
};

// Sets the rows of tokens that do not count to zero in both panels, so that what stood there, NaN even, is harmless.
// kept: a bit for each of the stage's tokens.
__device__ __forceinline__ void clear_rows(ptx::SharedAddress stage, bool same, unsigned kept_low, unsigned kept_high,
                                           int consumer) {
  const int thread = threadIdx.x % kWarpgroup, row = thread % kStageTokens, panel = thread / kStageTokens;
  const unsigned kept = row < kWarp ? kept_low >> row : kept_high >> (row - kWarp);
  if ((kept & 1) == 0 && !(same && panel == 1)) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // chunks in an order by which neighbouring rows meet different banks
      const int atom = i / 8, chunk = (i + row) % 8;
      ptx::store_zeros_16(stage + panel * kPanelBytes + atom * kAtomBytes + row * 128 + chunk * 16);
    }
    ptx::fence_proxy_async();
  }
  ptx::named_barrier(1 + consumer, kWarpgroup);
}

// A warpgroup that computes.
template <class T, bool kMasked, class Source>
__device__ __forceinline__ void consume(const Source& source, const Job& job, const Ring& ring, int consumer) {
  Place place;
  WarpgroupTile tile;
  unsigned turns = 0;  // of this warpgroup
  for_each_turn<Source>(job, [&](const Turn& turn, int whose) {
    const int stages = (turn.end - turn.begin) * Source::kProducts;
    if (whose != consumer) {
      place.skip(stages);
      return;
    }
    // The first warpgroup has the first turn: nobody passes it on.
    ptx::barrier_wait(ring.turn(consumer), (turns++ + (consumer == 0 ? 1 : 0)) % 2);
    const auto pass_on = [&] {
      if (threadIdx.x % kWarp == 0) ptx::barrier_arrive(ring.turn(1 - consumer));
    };
    if (stages == 0) return pass_on();
    const TilePlace at = banded_place(turn.tile, job.side);
    const bool same = one_panel<Source>(at);
    Cursor cursor;
    StageMask mask;
    if constexpr (kMasked) mask.fetch(source, cursor, turn.begin, turn.end);
    int in_use = -1;  // the slot that the products under way read
    const auto release = [&] {
      if (in_use >= 0 && threadIdx.x % kWarp == 0) ptx::barrier_arrive(ring.empty(in_use));
    };
    tile.clear();
    for (int stage = 0; stage < stages; ++stage, place.advance()) {
      const ptx::SharedAddress left = ring.stage(place.slot), right = same ? left : left + kPanelBytes;
      unsigned kept_low = ~0u, kept_high = ~0u;
      if constexpr (kMasked) {
        kept_low = __ballot_sync(~0u, mask.own[0] != 0);
        kept_high = __ballot_sync(~0u, mask.own[1] != 0);
        mask.fetch(source, cursor, turn.begin + stage + 1, turn.end);
      }
      ptx::barrier_wait(ring.full(place.slot), place.phase);
      if (stage + 1 == stages) pass_on();
      if (kMasked && (kept_low | kept_high) == 0) {  // nothing here counts
        // Nor may the stage before be kept: after enough stages like this one the copies would wait for it for ever.
        ptx::wgmma_wait<0>();
        release();
        in_use = place.slot;
        continue;
      }
      if (kMasked && (kept_low & kept_high) != ~0u) clear_rows(left, same, kept_low, kept_high, consumer);
      const std::uint64_t a = operand(left), b = operand(right);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageTokens; k += 16) {
        constexpr int kUnit = 16;  // bytes: addresses in an operand are counted in these
        ptx::wgmma_m64n128k16<T>(tile.sums[0], a + k * 128 / kUnit, b + k * 128 / kUnit);
        ptx::wgmma_m64n128k16<T>(tile.sums[1], a + (kAtomBytes + k * 128) / kUnit, b + k * 128 / kUnit);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the stage before this one
      release();
      in_use = place.slot;
    }
    ptx::wgmma_wait<0>();
    release();
    ptx::hold(tile.sums[0]);
    ptx::hold(tile.sums[1]);
    if (job.parts == nullptr) {
      add_to_gram(tile, job.gram, ptx::opaque(job.gram_stride), job.in,
                  ptx::opaque(static_cast<std::int64_t>(at.row) * kTile),
                  ptx::opaque(static_cast<std::int64_t>(at.column) * kTile));
    } else {
      const std::int64_t place_of_tile = static_cast<std::int64_t>(at.row) * (at.row + 1) / 2 + at.column;
      add_to_part(tile, job.parts, static_cast<std::int64_t>(turn.split) * job.tiles + place_of_tile, turn.chunk == 0);
    }
  });
}

template <class T, bool kMasked, class Source>
__global__ void __launch_bounds__(kThreads, 1) multiply_tiles(const __grid_constant__ Source source, Job job) {
#if HPA_HOPPER_CODE
  HPA_DYNAMIC_SHARED(memory);
  const Ring ring(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kRing; ++slot) {
      ptx::barrier_init(ring.full(slot), 1);
      ptx::barrier_init(ring.empty(slot), kWarpgroup / kWarp);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      ptx::barrier_init(ring.turn(consumer), kWarpgroup / kWarp);
    }
    ptx::fence_barrier_init();
    ptx::fence_proxy_async();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == kConsumers) {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) produce(source, job, ring);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    consume<T, kMasked>(source, job, ring, warpgroup);
  }
#else
  (void)source;
  (void)job;
#endif
}

}  // namespace hpa::cuda::sm90
