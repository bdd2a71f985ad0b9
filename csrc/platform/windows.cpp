// Windows 10 and later: WaitOnAddress, affinity within one group of processors.

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#if !defined(_WIN32_WINNT)
#define _WIN32_WINNT 0x0A00
#endif
#include <windows.h>

#include <io.h>
#include <malloc.h>

#include <algorithm>
#include <bitset>

#include "platform/system.h"

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

void* allocate_aligned(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }

void free_aligned(void* memory) { _aligned_free(memory); }

// Large pages are for accounts with the right to lock memory, and not to be had for memory that is there already.
void prefer_huge_pages(void* /*begin*/, size_t /*bytes*/) {}

size_t page_bytes() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}

bool knows_resident_pages() { return false; }

void find_resident_pages(uintptr_t /*first*/, size_t count, bool* is) { std::fill_n(is, count, true); }

int find_resident_ranges(uintptr_t /*begin*/, uintptr_t /*end*/, ByteRange* /*ranges*/, int /*most*/) { return -1; }

// ---- files ----------------------------------------------------------------------------------------

bool read_at(int descriptor, int64_t offset, void* out, size_t bytes) {
  constexpr size_t kMostBytesRead = size_t{1} << 30;  // at once: the system counts in 32 bits
  const HANDLE file = reinterpret_cast<HANDLE>(_get_osfhandle(descriptor));
  char* next = static_cast<char*>(out);
  while (bytes > 0) {
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(offset);
    place.OffsetHigh = static_cast<DWORD>(offset >> 32);
    DWORD count = 0;
    if (!ReadFile(file, next, static_cast<DWORD>(std::min(bytes, kMostBytesRead)), &count, &place) || count == 0)
      return false;
    next += count;
    offset += count;
    bytes -= count;
  }
  return true;
}

void close_file(int descriptor) { _close(descriptor); }

// ---- registers ------------------------------------------------------------------------------------

// To lend them, Windows wants a thread to ask with functions that only its newest versions have.
bool may_use_amx() { return false; }

// ---- sleep ----------------------------------------------------------------------------------------

static_assert(sizeof(SleepWord) == sizeof(uint32_t), "what the system compares");

void sleep_at(SleepWord& word, uint32_t value) { WaitOnAddress(&word, &value, sizeof value, INFINITE); }

void wake_one(SleepWord& word) { WakeByAddressSingle(&word); }

// ---- threads --------------------------------------------------------------------------------------

namespace {

// Where there are several groups, of at most 64 processors each, the system spreads threads over them by itself, and
// what is known here is only the group where the caller is.
bool has_one_group() {
  static const bool one = GetActiveProcessorGroupCount() == 1;
  return one;
}

Processors from_mask(KAFFINITY mask) {
  Processors processors{};
  processors.words[0] = has_one_group() ? mask : 0;
  return processors;
}

KAFFINITY own_bit() { return KAFFINITY{1} << GetCurrentProcessorNumber() % 64; }

}  // namespace

Processors processors_beside_caller() {
  GROUP_AFFINITY affinity;
  if (!GetThreadGroupAffinity(GetCurrentThread(), &affinity)) return {};
  const KAFFINITY others = affinity.Mask & ~own_bit();
  return from_mask(others != 0 ? others : affinity.Mask);
}

Processors processor_of_caller() { return from_mask(own_bit()); }

int64_t count_of(const Processors& processors) {
  return static_cast<int64_t>(std::bitset<64>(processors.words[0]).count());
}

int64_t processor_number_of_caller() { return GetCurrentProcessorNumber(); }

void ThreadHandle::introduce_caller(const char* name) {
  // A right of its own, because what GetCurrentThread gives means the caller, whoever that is. Never closed: workers
  // serve until the process ends.
  const HANDLE self = OpenThread(THREAD_SET_INFORMATION | THREAD_QUERY_INFORMATION, FALSE, GetCurrentThreadId());
  if (self == nullptr) return;
  wchar_t wide[32] = {};
  for (size_t i = 0; i + 1 < sizeof wide / sizeof *wide && name[i] != '\0'; ++i)
    wide[i] = static_cast<wchar_t>(name[i]);
  SetThreadDescription(self, wide);
  id_.store(reinterpret_cast<uint64_t>(self), std::memory_order_release);
}

bool ThreadHandle::run_on(const Processors& processors) {
  const uint64_t id = id_.load(std::memory_order_acquire);
  if (id == 0) return false;
  const uint64_t mask = processors.words[0];
  if (mask == 0 || mask == processors_.words[0]) return true;
  SetThreadAffinityMask(reinterpret_cast<HANDLE>(id), mask);
  processors_ = processors;
  return true;
}

// QueryThreadCycleTime does not promise to count what a thread has run since it was last put on a processor. A worker
// in the midst of its part would then look as if it did not run, and be moved.
uint64_t ThreadHandle::time_run() const { return clock_; }

void call_in_forked_children(void (* /*work*/)()) {}

void call_around_forks(void (* /*before*/)(), void (* /*after*/)()) {}

}  // namespace bitnet_ops
