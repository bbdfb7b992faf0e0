// A small persistent thread pool. Tasks are picked up in any order by any thread, so a task's result must not depend
// on who runs it or when: operations cut their work by shape alone and combine partial results in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

namespace hpa::cpu {

// Threads that parallel_for uses at most, hence also how many different slots it hands out.
std::int64_t slot_count();

namespace detail {
using Invoke = void (*)(void* body, std::int64_t task, std::int64_t slot);
void run_tasks(std::int64_t tasks, std::int64_t slots, void* body, Invoke invoke);
}  // namespace detail

// Calls body(task, slot) for every task in [0, tasks), and returns when all are done. No two calls that run at the
// same time share a slot, and slots lie in [0, slots): the caller's scratch memory can be indexed with them.
// Inside a task, and while another thread uses the pool, everything runs on the calling thread. The body must not
// throw.
template <typename Body>
void parallel_for(std::int64_t tasks, std::int64_t slots, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_tasks(
      tasks, slots, const_cast<void*>(static_cast<const void*>(&body)),
      [](void* object, std::int64_t task, std::int64_t slot) { (*static_cast<Plain*>(object))(task, slot); });
}

template <typename Body>
void parallel_for(std::int64_t tasks, Body&& body) {
  parallel_for(tasks, slot_count(), [&](std::int64_t task, std::int64_t) { body(task); });
}

}  // namespace hpa::cpu
