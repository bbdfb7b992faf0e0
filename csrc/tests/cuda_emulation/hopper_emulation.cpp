// The state behind hopper_emulation.h. Written from the PTX ISA's and the driver API's text, not from the kernels.
#include "hopper_emulation.h"

#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

using hpa_emulation::fail;
using hpa_emulation::settings;
using Address = hpa::cuda::ptx::SharedAddress;

constexpr unsigned kLanes = 32;
unsigned warp_of_thread() { return threadIdx.x / kLanes; }

// ---------------------------------------------------------------------------------------------- shared memory window
void require_shared(Address address, std::size_t bytes, std::size_t alignment, const char* what) {
  const auto begin = reinterpret_cast<Address>(hpa_emulation::dynamic_shared());
  if (address < begin || address + bytes > begin + hpa_emulation::dynamic_shared_bytes() || address % alignment != 0) {
    fail(what);
  }
}

// Descriptors keep 18 bits of an address; a block has less shared memory than that.
Address shared_address_of(std::uint64_t low) {
  const auto begin = reinterpret_cast<Address>(hpa_emulation::dynamic_shared());
  return begin + ((low - begin) & 0x3ffff);
}

// The 128-byte swizzle, on addresses: bits 4 to 6 are combined with bits 7 to 9.
Address swizzled(Address address) { return address ^ ((address >> 7 & 7) << 4); }

// ------------------------------------------------------------------------------------------------------- tensor maps
struct TensorMap {  // what CUtensorMap hides
  std::uint64_t magic;
  const unsigned char* data;
  std::uint64_t sizes[2], row_bytes;
  std::uint32_t box[2], element_bytes;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr std::uint64_t kMagic = 0x54656e736f724d61;

struct Copy {
  Address target;
  TensorMap map;
  std::int64_t column, row;

  unsigned bytes() const { return map.box[0] * map.box[1] * map.element_bytes; }
  void perform() const {
    for (std::uint32_t r = 0; r < map.box[1]; ++r) {
      for (std::uint32_t c = 0; c < map.box[0]; ++c) {
        const std::int64_t from_row = row + r, from_column = column + c;
        const bool inside = from_row >= 0 && from_row < static_cast<std::int64_t>(map.sizes[1]) && from_column >= 0 &&
                            from_column < static_cast<std::int64_t>(map.sizes[0]);
        const Address to = swizzled(target + (static_cast<Address>(r) * map.box[0] + c) * map.element_bytes);
        if (inside) {
          std::memcpy(reinterpret_cast<void*>(to),
                      map.data + static_cast<std::uint64_t>(from_row) * map.row_bytes +
                          static_cast<std::uint64_t>(from_column) * map.element_bytes,
                      map.element_bytes);
        } else {
          std::memset(reinterpret_cast<void*>(to), 0, map.element_bytes);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- barriers
struct Barrier {
  unsigned arrivals = 0;   // of each phase
  unsigned pending = 0;    // of the current one
  std::int64_t bytes = 0;  // announced less written
  unsigned phase = 0;      // how many have ended
  std::vector<Copy> copies;

  void end_phase_if_complete() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = arrivals;
  }
  void arrive(std::int64_t announced) {
    if (pending == 0) fail("more arrivals at a barrier in shared memory than it was initialised for");
    bytes += announced;
    --pending;
    end_phase_if_complete();
  }
  void perform_copies() {
    std::vector<Copy> now;
    now.swap(copies);
    for (const Copy& copy : now) {
      copy.perform();
      bytes -= copy.bytes();
      end_phase_if_complete();
    }
  }
};
std::map<Address, Barrier> barriers;
bool barriers_visible = false;

Barrier& barrier_at(Address address) {
  require_shared(address, 8, 8, "a barrier in shared memory that is misaligned or outside");
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("a barrier in shared memory that was not initialised");
  if (!barriers_visible) fail("a barrier in shared memory without a fence after its initialisation");
  return found->second;
}

struct NamedBarrier {
  int arrived = 0, generation = 0;
  std::set<unsigned> warps, first_warps;  // of this generation, and of the first one
};
std::map<int, NamedBarrier> named_barriers;

// ---------------------------------------------------------------------------------------- products of a warpgroup
struct Product {
  std::uint64_t a, b;
  float* sums[kLanes];
  float (*to_float)(std::uint16_t);
};
struct WarpProducts {
  std::deque<std::vector<Product>> groups{1};  // the last one is still open
  bool fenced = false;
  unsigned issued = 0;
};
std::map<unsigned, WarpProducts> products;

// Element (mn, k) of an operand that is contiguous along mn, 128-byte swizzled: in elements of T = 8 to 16 bytes,
// ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)), the swizzle applied to the address.
struct Operand {
  Address start;
  std::uint64_t leading, stride;

  explicit Operand(std::uint64_t descriptor) {
    start = shared_address_of((descriptor & 0x3fff) << 4);
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle, the only one modelled");
    if ((descriptor >> 49 & 7) != 0 || start % 1024 != 0) fail("a matrix descriptor off the swizzle's 1024 bytes");
    if ((descriptor & 0x3ff1c000c000c000ull) != 0) fail("a matrix descriptor with bits where there are none");
  }
  std::uint16_t at(unsigned mn, unsigned k) const {
    const Address address =
        swizzled(start + mn % 8 * 2 + mn / 8 % 8 * 16 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride);
    require_shared(address, 2, 2, "a product reads outside shared memory");
    std::uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), 2);
    return bits;
  }
};

// The part of one warp: rows 16 w to 16 w + 15 of the 64.
void perform(const Product& product, unsigned warp) {
  const Operand left(product.a), right(product.b);
  float a[16][16], b[128][16];
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned m = 0; m < 16; ++m) a[m][k] = product.to_float(left.at(warp % 4 * 16 + m, k));
    for (unsigned n = 0; n < 128; ++n) b[n][k] = product.to_float(right.at(n, k));
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    for (unsigned e = 0; e < 64; ++e) {  // d[4 j + i]: row lane / 4 (+ 8 for i >= 2), column 8 j + 2 (lane % 4) + i % 2
      const unsigned row = lane / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
      double sum = product.sums[lane][e];
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[column][k];
      product.sums[lane][e] = static_cast<float>(sum);
    }
  }
}

struct ProductLane {
  unsigned warp;
  std::uint64_t a, b;
  float* sums;
  float (*to_float)(std::uint16_t);
};
void issue(void* const* lanes) {
  const auto& first = *static_cast<const ProductLane*>(lanes[0]);
  WarpProducts& own = products[first.warp];
  if (!own.fenced) fail("a product without wgmma.fence since its registers were last free");
  Product product{first.a, first.b, {}, first.to_float};
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& other = *static_cast<const ProductLane*>(lanes[lane]);
    if (other.a != first.a || other.b != first.b) fail("the lanes of a warp give different matrix descriptors");
    product.sums[lane] = other.sums;
  }
  ++own.issued;
  if (settings().copy_at_once) {
    perform(product, first.warp);
  } else {
    own.groups.back().push_back(product);
  }
}

struct WarpLane {
  unsigned warp;
  int pending;
};
void fence_warp(void* const* lanes) { products[static_cast<const WarpLane*>(lanes[0])->warp].fenced = true; }
void commit_warp(void* const* lanes) { products[static_cast<const WarpLane*>(lanes[0])->warp].groups.emplace_back(); }
void wait_warp(void* const* lanes) {
  const auto& lane = *static_cast<const WarpLane*>(lanes[0]);
  WarpProducts& own = products[lane.warp];
  while (static_cast<int>(own.groups.size()) - 1 > lane.pending) {
    for (const Product& product : own.groups.front()) perform(product, lane.warp);
    own.groups.pop_front();
  }
  own.fenced = false;
}

// --------------------------------------------------------------------------------------------------------- per block
std::map<unsigned, std::vector<Address>> zeros;  // by thread, written but not yet behind a fence
std::map<unsigned, int> registers;               // by warp, after setmaxnreg

void block_hook(bool begin) {
  if (!begin) {
    for (const auto& [address, barrier] : barriers) {
      if (!barrier.copies.empty()) fail("a block ends with copies under way");
    }
    for (const auto& [warp, own] : products) {
      if (own.groups.size() > 1 || !own.groups.back().empty()) fail("a block ends with products under way");
      if (own.issued != products[warp / 4 * 4].issued) fail("the warps of a warpgroup issued different products");
    }
  }
  barriers.clear();
  barriers_visible = false;
  named_barriers.clear();
  products.clear();
  zeros.clear();
  registers.clear();
}
[[maybe_unused]] const bool hooked = (hpa_emulation::add_block_hook(block_hook), true);

}  // namespace

namespace hpa::cuda::ptx {

void barrier_init(SharedAddress barrier, unsigned arrivals) {
  require_shared(barrier, 8, 8, "a barrier in shared memory that is misaligned or outside");
  Barrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  barriers[barrier] = fresh;
}
void fence_barrier_init() { barriers_visible = true; }
void barrier_arrive(SharedAddress barrier) { barrier_at(barrier).arrive(0); }
void barrier_arrive_expecting(SharedAddress barrier, unsigned bytes) { barrier_at(barrier).arrive(bytes); }

void barrier_wait(SharedAddress barrier, unsigned parity) {
  struct Argument {
    Barrier* barrier;
    unsigned parity;
    bool first;  // the copies arrive only once somebody has begun to wait
  } argument{&barrier_at(barrier), parity, true};
  hpa_emulation::wait_until(
      [](void* pointer) {
        auto& waiting = *static_cast<Argument*>(pointer);
        if (!waiting.first) waiting.barrier->perform_copies();
        waiting.first = false;
        return waiting.barrier->phase % 2 != waiting.parity;  // the phase of this parity is no longer the current one
      },
      &argument);
}

void store_zeros_16(SharedAddress address) {
  require_shared(address, 16, 16, "zeros written outside shared memory");
  if (settings().copy_at_once) {
    std::memset(reinterpret_cast<void*>(address), 0, 16);
  } else {
    zeros[threadIdx.x].push_back(address);
  }
}

void fence_proxy_async() {
  for (const SharedAddress address : zeros[threadIdx.x]) std::memset(reinterpret_cast<void*>(address), 0, 16);
  zeros[threadIdx.x].clear();
}

void copy_box(SharedAddress target, const CUtensorMap* map, SharedAddress barrier, int column, int row) {
  Copy copy{target, {}, column, row};
  std::memcpy(&copy.map, map, sizeof copy.map);
  if (copy.map.magic != kMagic) fail("a copy by what is no tensor map");
  require_shared(target, copy.bytes(), 1024, "a box that is misaligned for the swizzle or outside shared memory");
  Barrier& own = barrier_at(barrier);
  own.copies.push_back(copy);
  if (settings().copy_at_once) own.perform_copies();
}

void named_barrier(int number, int threads) {
  if (number <= 0 || number > 15 || threads % static_cast<int>(kLanes) != 0) fail("a named barrier out of range");
  NamedBarrier& own = named_barriers[number];
  struct Argument {
    NamedBarrier* barrier;
    int generation;
  } argument{&own, own.generation};
  own.warps.insert(warp_of_thread());
  if (++own.arrived == threads) {
    // The hardware would let others use the number; then two groups that meet by chance are taken for one.
    if (own.generation == 0) own.first_warps = own.warps;
    if (own.warps != own.first_warps) fail("a named barrier used by different groups of warps");
    own.warps.clear();
    own.arrived = 0;
    ++own.generation;
  }
  hpa_emulation::wait_until(
      [](void* pointer) {
        const auto& waiting = *static_cast<Argument*>(pointer);
        return waiting.barrier->generation != waiting.generation;
      },
      &argument);
}

void set_registers(int count, bool) {
  if (count < 24 || count > 256 || count % 8 != 0) fail("setmaxnreg out of range");
  registers[warp_of_thread()] = count;
  int total = 0;
  for (const auto& [warp, each] : registers) total += each * static_cast<int>(kLanes);
  if (total > 65536) fail("setmaxnreg: more registers than a multiprocessor has");
}

void wgmma_fence() {
  WarpLane lane{warp_of_thread(), 0};
  hpa_emulation::warp_collective(&lane, fence_warp);
}
void wgmma_commit() {
  WarpLane lane{warp_of_thread(), 0};
  hpa_emulation::warp_collective(&lane, commit_warp);
}
void wgmma_wait_group(int pending) {
  WarpLane lane{warp_of_thread(), pending};
  hpa_emulation::warp_collective(&lane, wait_warp);
}
void wgmma_m64n128k16_transposed(float* d, std::uint64_t a, std::uint64_t b, float (*to_float)(std::uint16_t)) {
  ProductLane lane{warp_of_thread(), a, b, d, to_float};
  hpa_emulation::warp_collective(&lane, issue);
}

}  // namespace hpa::cuda::ptx

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr std::uint64_t kElementBytes = 2;
  const auto at = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  bool fine = at(map) % 64 == 0 && at(address) % 16 == 0 && rank == 2 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
              (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  for (int i = 0; i < 2; ++i) {
    fine = fine && sizes[i] >= 1 && sizes[i] <= std::uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  fine = fine && strides[0] % 16 == 0 && strides[0] < std::uint64_t{1} << 40 &&
         strides[0] >= sizes[0] * kElementBytes && box[0] * kElementBytes % 16 == 0 &&
         box[0] * kElementBytes == 128;  // narrower boxes are not modelled
  if (!fine) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap hidden{kMagic,           static_cast<const unsigned char*>(address), {sizes[0], sizes[1]}, strides[0],
                         {box[0], box[1]}, static_cast<std::uint32_t>(kElementBytes)};
  std::memset(map, 0xff, sizeof *map);
  std::memcpy(map, &hidden, sizeof hidden);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
