// Linux, beside posix.cpp: affinity, CPU clocks of threads, transparent huge pages, the page table. Threads sleep as in
// sleep_by_futex.cpp.

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "platform/system.h"

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

void prefer_huge_pages(void* begin, size_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

namespace {

constexpr int kNotOpened = -2;

// /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): 64 bits for each page. A descriptor shows the process
// that opened it, so a forked child needs its own.
std::atomic<int> page_map{kNotOpened};

int page_map_descriptor() {
  int descriptor = page_map.load(std::memory_order_acquire);
  if (descriptor != kNotOpened) return descriptor;
  static const bool in_children = (call_in_forked_children([] {
                                     const int old = page_map.exchange(kNotOpened);
                                     if (old >= 0) close(old);
                                   }),
                                   true);
  static_cast<void>(in_children);
  const int opened = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (!page_map.compare_exchange_strong(descriptor, opened)) {  // another thread was first
    if (opened >= 0) close(opened);
    return descriptor;
  }
  return opened;
}

}  // namespace

bool knows_resident_pages() { return page_map_descriptor() >= 0; }

void find_resident_pages(uintptr_t first, size_t count, bool* is) {
  constexpr uint64_t kPresent = uint64_t{1} << 63;
  constexpr uint64_t kSwapped = uint64_t{1} << 62;
  constexpr size_t kEntries = 64;
  uint64_t entries[kEntries];
  while (count > 0) {
    const size_t some = std::min(count, kEntries);
    const bool known = read_at(page_map_descriptor(), static_cast<int64_t>(first * sizeof(uint64_t)), entries,
                               some * sizeof(uint64_t));
    for (size_t i = 0; i < some; ++i) is[i] = !known || (entries[i] & (kPresent | kSwapped)) != 0;
    first += some;
    is += some;
    count -= some;
  }
}

namespace {

// The ioctl PAGEMAP_SCAN of Linux 6.7, which older headers lack.
struct PageRegion {
  uint64_t start, end, categories;
};
struct ScanArguments {
  uint64_t size, flags, start, end, walk_end, regions, most_regions, most_pages;
  uint64_t inverted, all_of, any_of, returned;
};
constexpr unsigned long kScan = _IOWR('f', 16, ScanArguments);
constexpr uint64_t kScanPresent = 1 << 3;
constexpr uint64_t kScanSwapped = 1 << 4;

}  // namespace

int find_resident_ranges(uintptr_t begin, uintptr_t end, ByteRange* ranges, int most) {
  constexpr int kMost = 16;
  most = std::min(most, kMost);
  PageRegion regions[kMost];
  ScanArguments scan{};
  scan.size = sizeof scan;
  scan.start = begin / page_bytes() * page_bytes();
  scan.end = (end + page_bytes() - 1) / page_bytes() * page_bytes();
  scan.regions = reinterpret_cast<uint64_t>(regions);
  scan.most_regions = static_cast<uint64_t>(most);
  scan.any_of = kScanPresent | kScanSwapped;
  scan.returned = scan.any_of;
  const int count = ioctl(page_map_descriptor(), kScan, &scan);
  if (count < 0 || scan.walk_end != scan.end) return -1;
  for (int i = 0; i < count; ++i) ranges[i] = {regions[i].start, regions[i].end};
  return count;
}

// ---- registers ------------------------------------------------------------------------------------

bool may_use_amx() {
#if defined(__x86_64__)
  // arch/x86/include/uapi/asm/prctl.h, which older system headers lack, and the number of the registers in XCR0.
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

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

int64_t count_of(const Processors& processors) {
  cpu_set_t cpus;
  std::memcpy(&cpus, &processors, sizeof cpus);
  return CPU_COUNT(&cpus);
}

int64_t processor_number_of_caller() { return sched_getcpu(); }

void ThreadHandle::introduce_caller(const char* name) {
  pthread_setname_np(pthread_self(), name);
  clockid_t clock;
  if (pthread_getcpuclockid(pthread_self(), &clock) == 0) clock_ = static_cast<uint64_t>(clock);
  id_.store(static_cast<uint64_t>(syscall(SYS_gettid)), std::memory_order_release);
}

bool ThreadHandle::run_on(const Processors& processors) {
  const uint64_t id = id_.load(std::memory_order_acquire);
  if (id == 0) return false;
  if (std::memcmp(&processors, &processors_, sizeof processors) == 0) return true;
  cpu_set_t cpus;
  std::memcpy(&cpus, &processors, sizeof cpus);
  sched_setaffinity(static_cast<pid_t>(id), sizeof cpus, &cpus);  // fails where the set is empty, which is as well
  processors_ = processors;
  return true;
}

uint64_t ThreadHandle::time_run() const {
  timespec time;
  if (clock_ == 0 || clock_gettime(static_cast<clockid_t>(clock_), &time) != 0) return 0;
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

}  // namespace bitnet_ops
