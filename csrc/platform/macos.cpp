// macOS on Apple silicon. It has no affinity, so workers run where the system puts them, and nobody can lend them a
// processor. Threads sleep as in sleep_by_condition.cpp.

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "platform/system.h"

namespace bitnet_ops {
namespace {

constexpr size_t kMostBytesRead = size_t{1} << 30;  // at once; macOS refuses more than an int can say

}  // namespace

// ---- memory ---------------------------------------------------------------------------------------

void* allocate_aligned(size_t alignment, size_t bytes) {
  void* memory;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

void free_aligned(void* memory) { std::free(memory); }

void prefer_huge_pages(void* /*begin*/, size_t /*bytes*/) {}

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

bool knows_resident_pages() { return false; }

void find_resident_pages(uintptr_t /*first*/, size_t count, bool* is) { std::fill_n(is, count, true); }

int find_resident_ranges(uintptr_t /*begin*/, uintptr_t /*end*/, ByteRange* /*ranges*/, int /*most*/) { return -1; }

// ---- files ----------------------------------------------------------------------------------------

bool read_at(int descriptor, int64_t offset, void* out, size_t bytes) {
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

// ---- registers ------------------------------------------------------------------------------------

bool may_use_amx() { return false; }

// ---- threads --------------------------------------------------------------------------------------

Processors processors_beside_caller() { return {}; }

Processors processor_of_caller() { return {}; }

int64_t count_of(const Processors& /*processors*/) { return 0; }

int64_t processor_number_of_caller() { return 0; }

void ThreadHandle::introduce_caller(const char* name) {
  pthread_setname_np(name);
  id_.store(1, std::memory_order_release);
}

bool ThreadHandle::run_on(const Processors& processors) {
  processors_ = processors;  // a wish; empty, as those above are
  return true;
}

// thread_info() does not promise to count what a thread has run since it was last put on a processor. A worker in the
// midst of its part would then look as if it did not run.
uint64_t ThreadHandle::time_run() const { return clock_; }

void call_in_forked_children(void (*work)()) { pthread_atfork(nullptr, nullptr, work); }

void call_around_forks(void (*before)(), void (*after)()) { pthread_atfork(before, after, after); }

}  // namespace bitnet_ops
