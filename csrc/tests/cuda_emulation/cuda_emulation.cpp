// The scheduler of the emulator: see cuda_emulation.h for what it checks and what it does not.
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace hpa_emulation {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned kLanes = 32;

enum class Waiting { no, barrier, warp, condition, done };

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread;
  Waiting waiting = Waiting::no;
  void* argument = nullptr;
  WarpFunction apply = nullptr;
  bool (*ready)(void* argument) = nullptr;
  std::deque<std::vector<Copy>> groups;  // the last one is still open
};

struct Block {
  unsigned size;
  unsigned at_barrier, finished;
  std::vector<unsigned> at_collective;  // per warp
};

struct SharedVariable {
  void* data;
  std::size_t bytes;
};

std::vector<SharedVariable> shared_variables;
std::vector<std::unique_ptr<Fiber>> fibers;
std::unique_ptr<unsigned char[]> dynamic_memory;
unsigned char* dynamic_data = nullptr;
std::size_t dynamic_bytes = 0;
std::vector<BlockHook> block_hooks;
ucontext_t scheduler;
Block block;
Fiber* current = nullptr;
const std::function<void()>* thread_function = nullptr;
std::map<const void*, int> shared_limits;
std::mt19937 generator;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] std::size_t scheduler_stack_bytes = 0;

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memset(copy.target, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.target, copy.source, static_cast<std::size_t>(copy.bytes));
  }
}

void to_scheduler(bool finished) {
  Fiber* const self = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(finished ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  (void)finished;
  swapcontext(&self->context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*thread_function)();
  current->waiting = Waiting::done;
  ++block.finished;
  to_scheduler(true);
}

std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (settings().order == Order::reverse) std::reverse(order.begin(), order.end());
  if (settings().order == Order::random) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

// Runs those of `count` threads from `first` on that can run, each to its next stop; whether there were any.
bool run_some(unsigned first, unsigned count) {
  bool progress = false;
  for (unsigned t : ordered(count)) {
    Fiber& fiber = *fibers[first + t];
    const bool runs =
        fiber.waiting == Waiting::no || (fiber.waiting == Waiting::condition && fiber.ready(fiber.argument));
    if (!runs) continue;
    fiber.waiting = Waiting::no;
    progress = true;
    to_fiber(fiber);
  }
  return progress;
}

void run_block() {
  for (const SharedVariable& variable : shared_variables) std::memset(variable.data, 0xff, variable.bytes);
  for (BlockHook hook : block_hooks) hook(true);
  block.at_barrier = block.finished = 0;
  block.at_collective.assign(block.size / kLanes, 0);
  while (fibers.size() < block.size) {
    fibers.push_back(std::make_unique<Fiber>());
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    fibers.back()->stack = static_cast<unsigned char*>(stack);
  }
  for (unsigned t = 0; t < block.size; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.thread = dim3(t, 0, 0);
    fiber.waiting = Waiting::no;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (block.finished < block.size) {
    bool progress = false;
    // In random order a warp runs as far as it can before the next one does; otherwise all go in step.
    const unsigned together = settings().order == Order::random ? kLanes : block.size;
    for (unsigned group : ordered(block.size / together)) {
      while (run_some(group * together, together)) {
        progress = true;
        if (together == block.size) break;
      }
    }
    if (!progress) fail("deadlock: some threads wait at a barrier that others never reach");
  }
  for (BlockHook hook : block_hooks) hook(false);
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

void* allocate_shared(std::size_t bytes) {
  void* data = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
  std::memset(data, 0xff, bytes);
  shared_variables.push_back({data, bytes});
  return data;
}

unsigned char* dynamic_shared() { return dynamic_data; }

std::size_t dynamic_shared_bytes() { return dynamic_bytes; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::abort();
}

void wait_until(bool (*ready)(void* argument), void* argument) {
  while (!ready(argument)) {
    current->ready = ready;
    current->argument = argument;
    current->waiting = Waiting::condition;
    to_scheduler(false);
  }
}

void add_block_hook(BlockHook hook) { block_hooks.push_back(hook); }

void block_barrier() {
  if (block.finished > 0) fail("a barrier after some threads of the block have exited");
  current->waiting = Waiting::barrier;
  if (++block.at_barrier == block.size) {
    block.at_barrier = 0;
    for (unsigned t = 0; t < block.size; ++t) fibers[t]->waiting = Waiting::no;
  }
  to_scheduler(false);
}

void warp_collective(void* argument, WarpFunction apply) {
  const unsigned warp = current->thread.x / kLanes;
  current->argument = argument;
  current->apply = apply;
  current->waiting = Waiting::warp;
  if (++block.at_collective[warp] == kLanes) {
    block.at_collective[warp] = 0;
    void* arguments[kLanes];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      Fiber& fiber = *fibers[warp * kLanes + lane];
      if (fiber.apply != apply) fail("the lanes of a warp are at different collectives");
      arguments[lane] = fiber.argument;
      fiber.waiting = Waiting::no;
    }
    apply(arguments);
  }
  to_scheduler(false);
}

void copy_async(void* target, const void* source, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(target) % 16 != 0 || bytes < 0 || bytes > 16 ||
      (bytes > 0 && reinterpret_cast<std::uintptr_t>(source) % 16 != 0)) {
    fail("a misaligned asynchronous copy");
  }
  if (settings().copy_at_once) {
    perform({Copy{target, source, bytes}});
  } else {
    current->groups.back().push_back({target, source, bytes});
  }
}

void copy_async_commit() { current->groups.emplace_back(); }

void copy_async_wait(int pending) {
  while (static_cast<int>(current->groups.size()) - 1 > pending) {
    perform(current->groups.front());
    current->groups.pop_front();
  }
}

void run(dim3 grid, dim3 threads, std::size_t shared_bytes, const std::function<void()>& thread) {
  generator.seed(settings().seed);
  gridDim = grid;
  blockDim = threads;
  block.size = threads.x;
  thread_function = &thread;
  // 16 bytes past a 1024-byte boundary: more alignment than this a kernel must see to itself. The low 18 bits of
  // addresses, which matrix descriptors keep, do not wrap within it.
  constexpr std::size_t kPast = 16, kWindow = 256 * 1024;
  if (shared_bytes + kPast > kWindow) fail("more shared memory than addresses of 18 bits reach");
  void* dynamic = std::aligned_alloc(kWindow, kWindow);
  dynamic_data = static_cast<unsigned char*>(dynamic) + kPast;
  dynamic_bytes = shared_bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(dynamic, kWindow);
  __asan_unpoison_memory_region(dynamic_data, shared_bytes);
#endif
  for (unsigned index : ordered(grid.x * grid.y * grid.z)) {
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    std::memset(dynamic_data, 0xff, shared_bytes);
    run_block();
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(dynamic, kWindow);
#endif
  std::free(dynamic);
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  if (settings().launches++ == settings().failing_launch) return cudaErrorInvalidConfiguration;
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const int limit = shared_limits.count(kernel) != 0 ? shared_limits[kernel] : 48 * 1024;
  const bool fine = grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                    grid.z <= 65535 && threads.x > 0 && threads.x <= 1024 && threads.x % kLanes == 0 &&
                    threads.y == 1 && threads.z == 1 && config.dynamicSmemBytes <= static_cast<std::size_t>(limit);
  return fine ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace hpa_emulation

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  constexpr int kHopperOptIn = 227 * 1024, kSmallestOptIn = 99 * 1024;  // the latter on 8.6, 8.9 and 12.0
  if (value > (hpa_emulation::settings().compute_capability == 90 ? kHopperOptIn : kSmallestOptIn)) {
    return cudaErrorInvalidValue;
  }
  hpa_emulation::shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = hpa_emulation::settings().compute_capability;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 3
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return cudaSuccess;
}
