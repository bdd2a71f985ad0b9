#include "run/dispatch.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "platform/cpu_features.h"

namespace bitnet_ops {

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAvx512VbmiKernels;
extern const KernelTable kAmxInt8Kernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
extern const KernelTable kNeonDotprodKernels;
extern const KernelTable kNeonI8mmKernels;
#endif

namespace {

struct Requirement {
  const KernelTable* table;
  uint32_t features;  // equals the target string of the kernel file, feature for feature
};

// Best first, on most CPUs.
constexpr Requirement kRequirements[] = {
#if defined(__x86_64__)
    {&kAmxInt8Kernels, kAvx2 | kFma | kF16c | kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl | kAvx512Vnni | kAvx512Vbmi |
                           kAmxTile | kAmxInt8},
    {&kAvx512VbmiKernels,
     kAvx2 | kFma | kF16c | kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl | kAvx512Vnni | kAvx512Vbmi},
    {&kAvx512VnniKernels, kAvx2 | kFma | kF16c | kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl | kAvx512Vnni},
    {&kAvxVnniKernels, kAvx2 | kFma | kF16c | kAvxVnni},
    {&kAvx2Kernels, kAvx2 | kFma | kF16c},
#elif defined(__aarch64__)
    {&kNeonI8mmKernels, kArmV82 | kDotprod | kI8mm},
    {&kNeonDotprodKernels, kArmV82 | kDotprod},
    {&kNeonKernels, 0},
#endif
    {&kScalarKernels, 0},
};
constexpr size_t kCount = sizeof kRequirements / sizeof kRequirements[0];

struct Candidates {
  Candidate list[kCount];

  Candidates() {
    const uint32_t features = cpu_features();
    for (size_t i = 0; i < kCount; ++i) {
      list[i] = {kRequirements[i].table, (kRequirements[i].features & ~features) == 0};
    }
    if ((features & kStreamsToL1) != 0) stream_ahead = kStreamToL1;
#if defined(__aarch64__)
    if (!(features & kFastI8mm)) std::swap(list[0], list[1]);  // dotprod before i8mm
#endif
  }
};

// Null until the first use, so that loading the library executes nothing.
std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const Candidate* candidates(size_t* count) {
  static const Candidates all;
  *count = kCount;
  return all.list;
}

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    size_t count;
    const Candidate* candidate = candidates(&count);
    while (!candidate->supported) ++candidate;  // ends at scalar, which needs nothing
    // A select() that ran meanwhile wins; compare_exchange then leaves its table in `table`.
    if (chosen.compare_exchange_strong(table, candidate->table)) table = candidate->table;
  }
  return *table;
}

bool select(const char* isa) {
  size_t count;
  const Candidate* list = candidates(&count);
  for (size_t i = 0; i < count; ++i) {
    if (list[i].supported && std::strcmp(list[i].table->isa, isa) == 0) {
      chosen.store(list[i].table, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace bitnet_ops
