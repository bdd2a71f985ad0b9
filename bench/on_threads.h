// Runs a probe on several cores at the same moment.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

// Calls work(0) .. work(threads - 1), each on a thread of its own that stays on cpus[t]: left to itself, a
// young thread often shares a core with its sibling for some milliseconds, as long as a probe takes. Returns
// the seconds from the first start to the last end: creating and joining the threads costs the figure nothing.
template <class Work>
double seconds_on_threads(int threads, const int* cpus, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> starts(threads);
  std::vector<Clock::time_point> ends(threads);
  std::atomic<int> ready{0};
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(cpus[t], &own);
      pthread_setaffinity_np(pthread_self(), sizeof own, &own);
      ++ready;
      while (ready < threads) std::this_thread::yield();
      starts[t] = Clock::now();
      work(t);
      ends[t] = Clock::now();
    });
  }
  for (std::thread& thread : all) thread.join();
  const auto first = *std::min_element(starts.begin(), starts.end());
  const auto last = *std::max_element(ends.begin(), ends.end());
  return std::chrono::duration<double>(last - first).count();
}
