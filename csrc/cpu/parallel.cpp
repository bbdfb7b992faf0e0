#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "hpa/runtime.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hpa::cpu {
namespace {

// Threads wait this many pauses (some 20 microseconds) before they sleep: the steps of one factorization follow each
// other faster than a sleeping thread wakes.
constexpr int kSpins = 1500;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

std::int32_t processors() {
#if defined(__linux__)
  // The affinity mask, where containers and batch systems say what may be used.
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && CPU_COUNT(&allowed) > 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<std::int32_t>(std::max(1u, std::thread::hardware_concurrency()));
}

std::atomic<std::int32_t>& configured_threads() {
  static std::atomic<std::int32_t> threads{processors()};
  return threads;
}

thread_local bool inside_task = false;

// Rounding to nearest and denormals kept while tasks run, whatever the calling thread has set.
class StandardFloatEnvironment {
 public:
  StandardFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloatEnvironment() { std::fesetenv(&saved_); }
  StandardFloatEnvironment(const StandardFloatEnvironment&) = delete;
  StandardFloatEnvironment& operator=(const StandardFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

struct Job {
  std::int64_t tasks = 0;
  void* body = nullptr;
  detail::Invoke invoke = nullptr;
  std::atomic<std::int64_t> next{0};

  void work(std::int64_t slot) {
    const StandardFloatEnvironment environment;
    inside_task = true;
    for (;;) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) break;
      invoke(body, task, slot);
    }
    inside_task = false;
  }
};

class Pool {
 public:
  const long owner_process = process_id();
  std::mutex in_use;  // held by the thread whose job runs

  void run(Job& job, std::int64_t slots) {
    grow(slots - 1);
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      slots_ = slots;
      next_slot_ = 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work(0);
    for (int i = 0; i < kSpins && active_.load(std::memory_order_acquire) != 0; ++i) pause();
    // A thread that did not come in time finds no job and goes back to sleep.
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return active_.load(std::memory_order_relaxed) == 0; });
  }

 private:
  void grow(std::int64_t threads) {
    while (threads_ < threads) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads do the same work
      }
      ++threads_;
    }
  }

  void serve() {
    std::uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      if (job_ == nullptr || next_slot_ >= slots_) continue;
      Job& job = *job_;
      const std::int64_t slot = next_slot_++;
      active_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work(slot);
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::int64_t threads_ = 0;  // guarded by in_use
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> active_{0};
  Job* job_ = nullptr;
  std::int64_t slots_ = 0, next_slot_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends. A child of fork() has none of its parent's
// threads, and locks in whatever state they were, so it makes a pool of its own. Null without memory for one.
Pool* pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (found == nullptr || found->owner_process != process_id()) {
    Pool* fresh = new (std::nothrow) Pool;
    if (fresh == nullptr || current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
  }
  return found;
}

}  // namespace

void set_thread_count(std::int32_t threads) { configured_threads().store(std::max(1, threads)); }
std::int32_t thread_count() { return configured_threads().load(); }
std::int64_t slot_count() { return thread_count(); }

void detail::run_tasks(std::int64_t tasks, std::int64_t slots, void* body, Invoke invoke) {
  if (tasks <= 0) return;
  if (inside_task) {
    for (std::int64_t task = 0; task < tasks; ++task) invoke(body, task, 0);
    return;
  }
  Job job;
  job.tasks = tasks;
  job.body = body;
  job.invoke = invoke;
  const std::int64_t used = std::min(slots, tasks);
  if (Pool* threads = used > 1 ? pool() : nullptr; threads != nullptr) {
    if (const std::unique_lock lock(threads->in_use, std::try_to_lock); lock.owns_lock()) {
      threads->run(job, used);
      return;
    }
  }
  job.work(0);
}

}  // namespace hpa::cpu
