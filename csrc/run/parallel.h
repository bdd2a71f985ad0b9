// The loop that shares work out among threads.
#pragma once

#include <cstdint>

#include "run/thread_pool.h"

namespace bitnet_ops {

// How many threads may work, the caller's own included: one, until somebody says who knows. The operators set it to
// torch's number, which torch.set_num_threads changes (ops/library.cpp).
inline int64_t (*thread_count)() = [] { return int64_t{1}; };

// Waking a second thread costs a few microseconds, so a thread is given this much work at least.
constexpr double kNanosecondsPerThread = 8000.0;

// Parts for each thread: one that starts late, or that loses its processor for a while, leaves the others to the
// rest. At the end of the work threads wait for each other for half a part on average, and taking one costs some 20 ns
// (bench/LOG.md).
constexpr int64_t kPartsPerThread = 64;
constexpr double kNanosecondsPerPart = 2000.0;

// Runs work(begin, end) over [0, count) in about equal parts; ns_per_item is a rough cost, which only
// decides how many threads are worth waking.
template <class Work>
void parallel(int64_t count, double ns_per_item, const Work& work) {
  if (count == 0) return;
  const double worth = static_cast<double>(count) * ns_per_item / kNanosecondsPerThread;
  int64_t threads = worth < 2.0 ? 1 : thread_count();
  if (static_cast<double>(threads) > worth) threads = static_cast<int64_t>(worth);
  if (threads <= 1) {
    work(int64_t{0}, count);
    return;
  }
  struct Context {
    const Work& work;
    int64_t count, parts;
  };
  int64_t parts = threads * kPartsPerThread;
  const double most_parts = static_cast<double>(count) * ns_per_item / kNanosecondsPerPart;
  if (static_cast<double>(parts) > most_parts) parts = static_cast<int64_t>(most_parts);
  if (parts > count) parts = count;
  if (parts > kMostParts) parts = kMostParts;
  const Context context{work, count, parts};
  run_parts(
      threads, parts,
      [](const void* untyped, int64_t part) {
        const Context& c = *static_cast<const Context*>(untyped);
        c.work(c.count * part / c.parts, c.count * (part + 1) / c.parts);
      },
      &context);
}

// What quantising (or norming) one element costs a core, roughly, for `parallel`.
constexpr double kNsPerQuantizedElement = 0.15;

}  // namespace bitnet_ops
