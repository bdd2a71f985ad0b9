// How fast memory can be read: the limit of decode. Part of the probe library that probes.py builds and loads.
//
// A limit has to be fair: no plain read of the same bytes should beat it. What reads fastest differs between
// machines (pages of 4 KB or 2 MB, the prefetchers, how many streams a core follows), so there are several
// variants; probes.py finds the best one for this machine and takes it for every later measurement.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "on_threads.h"

namespace {

typedef uint64_t Line __attribute__((vector_size(64)));  // a cache line; the compiler splits it where it must

constexpr size_t kUnroll = 4;  // lines of a stream in one iteration, each its own chain of additions

// Sums `lines` lines, read as `kStreams` sequential streams side by side.
template <size_t kStreams, size_t kAheadBytes>
uint64_t sum(const Line* data, size_t lines) {
  const size_t part = lines / kStreams;
  Line acc[kUnroll] = {};
  for (size_t i = 0; i + kUnroll <= part; i += kUnroll) {
    for (size_t s = 0; s < kStreams; ++s) {
      for (size_t j = 0; j < kUnroll; ++j) {
        const Line* line = data + s * part + i + j;
        if (kAheadBytes > 0) __builtin_prefetch(reinterpret_cast<const char*>(line) + kAheadBytes);
        acc[j] += *line;
      }
    }
  }
  const Line total = acc[0] + acc[1] + acc[2] + acc[3];
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result += total[i];
  return result;
}

struct Variant {
  uint64_t (*sum)(const Line* data, size_t lines);
  bool large_pages;
};

constexpr Variant kVariants[] = {
    {sum<1, 0>, true},    {sum<1, 0>, false},     // the hardware's own prefetchers
    {sum<1, 4096>, true}, {sum<1, 4096>, false},  // as far ahead as the kernels
    {sum<1, 8192>, true}, {sum<1, 8192>, false},  //
    {sum<2, 0>, true},    {sum<2, 0>, false},     //
    {sum<2, 4096>, true}, {sum<2, 4096>, false},  //
};

// Many times the last-level cache of common CPUs. Calls read the two halves in turn.
constexpr size_t kBufferBytes = size_t{512} << 20;
constexpr size_t kReadBytes = kBufferBytes / 2;

// Memory of its own (not the zero page that untouched memory shares), made once per process.
const Line* buffer(bool large_pages) {
  void* memory = mmap(nullptr, kBufferBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, kBufferBytes, large_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  auto* words = static_cast<uint64_t*>(memory);
  for (size_t i = 0; i < kBufferBytes / sizeof(uint64_t); ++i) words[i] = i;
  return static_cast<const Line*>(memory);
}

}  // namespace

extern "C" int read_variants() { return sizeof kVariants / sizeof *kVariants; }

// Bytes per second that `threads` threads read together, one on each of `cpus`; 0 without memory.
extern "C" double read_bandwidth(int variant, int threads, const int* cpus) {
  static const Line* const kSmallPages = buffer(false);
  static const Line* const kLargePages = buffer(true);
  static size_t offset = 0;
  static std::atomic<uint64_t> sink{0};  // the sums are used, so they are computed
  const Variant& chosen = kVariants[variant];
  const Line* data = chosen.large_pages ? kLargePages : kSmallPages;
  if (data == nullptr) return 0.0;
  data += offset / sizeof(Line);
  offset = (offset + kReadBytes) % kBufferBytes;
  const size_t part = kReadBytes / sizeof(Line) / threads;
  const double seconds = seconds_on_threads(threads, cpus, [&](int t) { sink += chosen.sum(data + t * part, part); });
  return kReadBytes / seconds;
}
