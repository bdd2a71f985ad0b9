// macOS on Apple silicon, beside posix.cpp. It has no affinity, so workers run where the system puts them, and nobody
// can lend them a processor. Threads sleep as in sleep_by_condition.cpp.

#include <pthread.h>

#include <algorithm>

#include "platform/system.h"

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

void prefer_huge_pages(void* /*begin*/, size_t /*bytes*/) {}

bool knows_resident_pages() { return false; }

void find_resident_pages(uintptr_t /*first*/, size_t count, bool* is) { std::fill_n(is, count, true); }

int find_resident_ranges(uintptr_t /*begin*/, uintptr_t /*end*/, ByteRange* /*ranges*/, int /*most*/) { return -1; }

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

}  // namespace bitnet_ops
