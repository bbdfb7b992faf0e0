// The tasks of several items, numbered one after the other, so that one parallel_for serves a whole list.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/buffer.h"

namespace hpa::cpu {

class TaskList {
 public:
  struct Place {
    std::int64_t item, task;  // of all items; of the item's own tasks
  };

  explicit TaskList(std::int64_t most_items) : first_(most_items + 1) {
    if (first_) first_[0] = 0;
  }
  explicit operator bool() const { return static_cast<bool>(first_); }

  // The next item; it may have no task.
  void add(std::int64_t tasks) {
    first_[items_ + 1] = first_[items_] + tasks;
    ++items_;
  }
  void clear() { items_ = 0; }

  std::int64_t items() const { return items_; }
  std::int64_t tasks() const { return first_[items_]; }
  Place find(std::int64_t task) const {
    const std::int64_t* after = std::upper_bound(first_.data() + 1, first_.data() + items_ + 1, task);
    const std::int64_t item = after - first_.data() - 1;
    return {item, task - first_[item]};
  }

 private:
  Buffer<std::int64_t> first_;
  std::int64_t items_ = 0;
};

}  // namespace hpa::cpu
