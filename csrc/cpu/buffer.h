// Scratch memory: uninitialised, aligned to cache lines, released with its owner; null when there is none left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hpa::cpu {

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    // Large buffers lie on huge pages: first touch then costs one fault in 2 MiB instead of 512.
    alignment_ = std::align_val_t{bytes >= 2 * kHugePage ? kHugePage : 64};
    data_ = static_cast<T*>(::operator new(bytes > 0 ? bytes : 1, alignment_, std::nothrow));
#if defined(__linux__)
    if (data_ != nullptr && bytes >= 2 * kHugePage) (void)madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { ::operator delete(data_, alignment_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  explicit operator bool() const { return data_ != nullptr; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{1} << 21;
  T* data_;
  std::align_val_t alignment_;
};

}  // namespace hpa::cpu
