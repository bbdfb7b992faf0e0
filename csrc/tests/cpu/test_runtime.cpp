// Threads, instruction sets, fork, and several callers at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>

#include "check.h"
#include "data.h"
#include "hpa/hpa.h"

#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace hpa;
using namespace hpa::test;

namespace {

std::vector<float> gram_of(const std::vector<float>& x, std::int64_t columns) {
  std::vector<float> gram(columns * columns);
  const ConstMatrix view = {x.data(), DType::float32, static_cast<std::int64_t>(x.size()) / columns, columns, columns};
  CHECK(cpu::gram_accumulate(view, nullptr, gram.data(), columns).ok(), "gram");
  return gram;
}

std::vector<float> random_values(std::int64_t count, unsigned seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (auto& v : values) v = static_cast<float>(random.normal());
  return values;
}

void settings() {
  cpu::set_thread_count(0);
  CHECK(cpu::thread_count() == 1, "at least one thread");
  cpu::set_thread_count(5);
  CHECK(cpu::thread_count() == 5, "");
  CHECK(std::string(cpu::available_instruction_sets()).rfind("portable", 0) == 0, cpu::available_instruction_sets());
  CHECK(cpu::set_instruction_set("quantum").code == StatusCode::unavailable, "");
  CHECK(refused(cpu::set_instruction_set(nullptr), "name"), "");
  CHECK(cpu::set_instruction_set("portable").ok() && std::string(cpu::instruction_set()) == "portable", "");
  for_each_instruction_set([](const std::string& set) { CHECK(set == cpu::instruction_set(), set); });
}

void several_callers() {
  cpu::set_thread_count(3);
  const std::int64_t columns = 200;
  const std::vector<float> x = random_values(300 * columns, 1), expected = gram_of(x, columns);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 20; ++round) wrong += gram_of(x, columns) != expected;
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0, "callers at once get the same result");
}

void after_fork() {
#if defined(__SANITIZE_THREAD__)
  std::puts("fork: skipped, ThreadSanitizer does not support threads in a forked child");
#elif defined(__unix__)
  cpu::set_thread_count(3);
  const std::int64_t columns = 200;
  const std::vector<float> x = random_values(300 * columns, 2), expected = gram_of(x, columns);
  for (int round = 0; round < 3; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a deadlock ends as a failure
      _exit(gram_of(x, columns) == expected && gram_of(x, columns) == expected ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "child of fork");
  }
  CHECK(gram_of(x, columns) == expected, "parent after fork");
#endif
}

void idle_pool_sleeps() {
  cpu::set_thread_count(3);
  (void)gram_of(random_values(100 * 130, 3), 130);
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(double(std::clock() - before) / CLOCKS_PER_SEC < 0.05, "an idle pool uses no processor time");
}

void float_environment() {
#if defined(__x86_64__)
  cpu::set_thread_count(1);
  for_each_instruction_set([&](const std::string& set) {
    const std::vector<float> expected = gram_of({1e-22f, 2e-22f}, 2);
    const unsigned int saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040);  // flush to zero, denormals are zero
    const std::vector<float> result = gram_of({1e-22f, 2e-22f}, 2);
    CHECK(_mm_getcsr() == (saved | 0x8040), set + " the caller's setting is kept");
    _mm_setcsr(saved);
    CHECK(expected[0] > 0 && result == expected, set + " denormals are kept");
  });
#endif
}

}  // namespace

int main() {
  settings();
  several_callers();
  after_fork();
  idle_pool_sleeps();
  float_environment();
  return report("runtime");
}
