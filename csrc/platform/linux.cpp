// Linux: futexes, affinity, CPU clocks of threads, transparent huge pages.

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "platform/system.h"

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

void* allocate_aligned(size_t alignment, size_t bytes) {
  void* memory;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}

void free_aligned(void* memory) { std::free(memory); }

void prefer_huge_pages(void* begin, size_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

// ---- sleep ----------------------------------------------------------------------------------------

static_assert(sizeof(SleepWord) == sizeof(uint32_t), "what the system takes for a futex");

void sleep_at(SleepWord& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_one(SleepWord& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

// ---- threads --------------------------------------------------------------------------------------

namespace {

static_assert(sizeof(cpu_set_t) == sizeof(Processors), "a set of processors is a cpu_set_t");

Processors processors_of(const cpu_set_t& cpus) {
  Processors processors;
  std::memcpy(&processors, &cpus, sizeof processors);
  return processors;
}

}  // namespace

Processors processors_beside_caller() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) CPU_ZERO(&cpus);  // there are more than the set can hold
  const int own = sched_getcpu();
  if (own >= 0 && CPU_COUNT(&cpus) > 1) CPU_CLR(own, &cpus);
  return processors_of(cpus);
}

Processors processor_of_caller() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  const int own = sched_getcpu();
  if (own >= 0) CPU_SET(own, &cpus);
  return processors_of(cpus);
}

void ThreadHandle::introduce_caller(const char* name) {
  pthread_setname_np(pthread_self(), name);
  clockid_t clock;
  if (pthread_getcpuclockid(pthread_self(), &clock) == 0) clock_ = static_cast<uint64_t>(clock);
  id_.store(static_cast<uint64_t>(syscall(SYS_gettid)), std::memory_order_release);
}

void ThreadHandle::run_on(const Processors& processors) {
  const uint64_t id = id_.load(std::memory_order_acquire);
  if (id == 0 || std::memcmp(&processors, &processors_, sizeof processors) == 0) return;
  cpu_set_t cpus;
  std::memcpy(&cpus, &processors, sizeof cpus);
  sched_setaffinity(static_cast<pid_t>(id), sizeof cpus, &cpus);  // fails where the set is empty, which is as well
  processors_ = processors;
}

uint64_t ThreadHandle::time_run() const {
  timespec time;
  if (clock_ == 0 || clock_gettime(static_cast<clockid_t>(clock_), &time) != 0) return 0;
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

void call_in_forked_children(void (*work)()) { pthread_atfork(nullptr, nullptr, work); }

void call_around_forks(void (*before)(), void (*after)()) { pthread_atfork(before, after, after); }

}  // namespace bitnet_ops
