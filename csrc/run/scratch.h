// A buffer that one thread keeps between calls, so that a decoded token allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "platform/system.h"

namespace bitnet_ops {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free_aligned(data_); }

  // Memory for this call, aligned to a cache line; its contents are undefined. Throws std::bad_alloc.
  void* reserve(size_t bytes) {
    // Beyond what is kept, a buffer that is far too large is given back: one long prompt must not
    // hold its memory for the life of the thread.
    const bool wasteful = bytes_ > kKeepBytes && bytes < bytes_ / 2;
    if (bytes > bytes_ || wasteful) {
      free_aligned(data_);
      data_ = nullptr;
      bytes_ = 0;
      const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      data_ = allocate_aligned(kAlignment, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = rounded;
    }
    return data_;
  }

 private:
  static constexpr size_t kAlignment = 64;
  // 512 tokens of 6912 quantised activations are 3.5 MB: ordinary prefill reuses its buffer.
  static constexpr size_t kKeepBytes = size_t{4} << 20;

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace bitnet_ops
