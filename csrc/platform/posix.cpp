// What Linux and macOS, which both keep to POSIX, have alike: memory, files, forks.

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "platform/system.h"

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

void* allocate_aligned(size_t alignment, size_t bytes) {
  void* memory;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

void free_aligned(void* memory) { std::free(memory); }

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// ---- files ----------------------------------------------------------------------------------------

bool read_at(int descriptor, int64_t offset, void* out, size_t bytes) {
  constexpr size_t kMostBytesRead = size_t{1} << 30;  // at once; macOS refuses more than an int can say
  char* next = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t count = pread(descriptor, next, std::min(bytes, kMostBytesRead), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    next += count;
    offset += count;
    bytes -= static_cast<size_t>(count);
  }
  return true;
}

void close_file(int descriptor) { close(descriptor); }

// ---- forks ----------------------------------------------------------------------------------------

void call_in_forked_children(void (*work)()) { pthread_atfork(nullptr, nullptr, work); }

void call_around_forks(void (*before)(), void (*after)()) { pthread_atfork(before, after, after); }

}  // namespace bitnet_ops
