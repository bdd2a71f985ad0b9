// What it costs to share work out among threads: csrc/run/thread_pool.cpp without PyTorch. Part of the library that
// probes.py builds and loads.

#include <chrono>
#include <cstdint>
#include <thread>

#include "run/thread_pool.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Keeps a core busy without memory.
void compute(int64_t rounds) {
  double value = 1.0;
  for (int64_t i = 0; i < rounds; ++i) {
    value = value * 1.0000001 + 1e-9;
    __asm__ volatile("" : "+r"(value));
  }
}

}  // namespace

// Seconds of `rounds` rounds of work in `parts` parts on `threads` threads, after the caller has slept, or computed,
// for `gap_seconds`.
extern "C" double region_seconds(int threads, int64_t rounds, int64_t parts, double gap_seconds, bool asleep) {
  if (asleep) {
    std::this_thread::sleep_for(std::chrono::duration<double>(gap_seconds));
  } else {
    for (const Clock::time_point begin = Clock::now(); seconds_since(begin) < gap_seconds;) compute(10);
  }
  const int64_t rounds_of_part = rounds / parts;
  const Clock::time_point begin = Clock::now();
  bitnet_ops::run_parts(
      threads, parts, [](const void* of_part, int64_t) { compute(*static_cast<const int64_t*>(of_part)); },
      &rounds_of_part);
  return seconds_since(begin);
}
