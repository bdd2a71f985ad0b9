#include "run/file_memory.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "platform/system.h"

namespace bitnet_ops {
namespace {

struct Mapping {
  const char* begin;
  const char* end;
  int descriptor;
  bool sparing;
};

// Of a table that is read again and again, these parts may be in memory: in every kPeriod stretches of kStretch bytes
// of the file the first kStays. Reading from a file takes 2.7 times as long as reading through a mapping that is there
// (bench/LOG.md), so three eighths of 2B4T's table, 246 MB, save a quarter of the time of a token's scores. A stretch
// is the largest folio of the page cache, of which the system maps all where one page is looked at.
constexpr int64_t kStretch = int64_t{2} << 20;
constexpr int64_t kPeriod = 8;
constexpr int64_t kStays = 3;

std::mutex mutex;

std::vector<Mapping>& mappings() {
  static std::vector<Mapping>* all = new std::vector<Mapping>;  // threads may still run when the program ends
  return *all;
}

}  // namespace

void add_file_memory(const void* begin, size_t bytes, int descriptor, bool sparing) {
  const char* first = static_cast<const char*>(begin);
  const std::lock_guard<std::mutex> lock(mutex);
  mappings().push_back({first, first + bytes, descriptor, sparing});
}

void remove_file_memory(const void* begin) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<Mapping>& all = mappings();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Mapping& one) { return one.begin == begin; });
  if (found == all.end()) return;
  close_file(found->descriptor);
  all.erase(found);
}

FileRows::FileRows(const void* matrix, int64_t rows, size_t row_bytes, int64_t wanted)
    : matrix_(static_cast<const char*>(matrix)), row_bytes_(row_bytes) {
  // One look at a row's pages takes 0.3 us and more with several threads, one at a whole table 12 us.
  constexpr int64_t kWorthScanning = 32;
  const size_t bytes = static_cast<size_t>(rows) * row_bytes;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Mapping& one : mappings()) {
      if (matrix_ < one.begin || matrix_ >= one.end || bytes > static_cast<size_t>(one.end - matrix_)) continue;
      if (!knows_resident_pages()) return;
      descriptor_ = one.descriptor;
      offset_ = matrix_ - one.begin;
      sparing_ = one.sparing;
    }
  }
  // A pass over all rows asks about them only where it has to spare memory.
  if (descriptor_ < 0 || wanted < kWorthScanning || (wanted == rows && !sparing_)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(matrix_);
  ranges_ = find_resident_ranges(begin, begin + bytes, resident_, kMostRanges);
}

bool FileRows::is_absent(uintptr_t begin, uintptr_t end) const {
  if (ranges_ < 0) return false;
  for (int i = 0; i < ranges_; ++i) {
    if (begin < resident_[i].end && resident_[i].begin < end) return false;
  }
  return true;
}

bool FileRows::is_resident(uintptr_t begin, uintptr_t end) const {
  for (int i = 0; i < ranges_; ++i) {
    if (resident_[i].begin <= begin && end <= resident_[i].end) return true;
  }
  return false;
}

const char* FileRows::in_memory(int64_t row, int64_t count, bool may_stay) const {
  const int64_t bytes = static_cast<int64_t>(row_bytes_);
  const char* begin = matrix_ + row * bytes;
  const char* end = begin + count * bytes;
  if (is_resident(reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(end))) return begin;
  const auto stays = [&](const char* at) { return (offset_ + (at - matrix_)) / kStretch % kPeriod < kStays; };
  return may_stay && stays(begin) && stays(end - 1) ? begin : nullptr;
}

void FileRows::copy(int64_t row, int64_t count, char* out) const {
  const int64_t from = row * static_cast<int64_t>(row_bytes_);
  const char* begin = matrix_ + from;
  const char* end = begin + count * static_cast<int64_t>(row_bytes_);
  const auto page_of = [](const char* at) { return reinterpret_cast<uintptr_t>(at) / page_bytes(); };
  constexpr size_t kPages = 64;
  bool resident[kPages];
  const bool absent = is_absent(reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(end));
  while (begin < end) {
    const char* stop = end;
    resident[0] = false;
    if (!absent) {
      // As many pages as can be asked about at once, and of them the first ones that are alike.
      const uintptr_t first = page_of(begin);
      const size_t pages = std::min<size_t>(page_of(end - 1) - first + 1, kPages);
      find_resident_pages(first, pages, resident);
      size_t alike = 1;
      while (alike < pages && resident[alike] == resident[0]) ++alike;
      stop = std::min(end, reinterpret_cast<const char*>((first + alike) * page_bytes()));
    }
    const size_t bytes = static_cast<size_t>(stop - begin);
    if (resident[0]) {
      std::memcpy(out, begin, bytes);
    } else if (!read_at(descriptor_, offset_ + (begin - matrix_), out, bytes)) {
      throw std::runtime_error(
          "bitnet_ops: the file that a matrix is mapped from cannot be read any more: it was made shorter, or the disk "
          "failed");
    }
    out += bytes;
    begin = stop;
  }
}

}  // namespace bitnet_ops
