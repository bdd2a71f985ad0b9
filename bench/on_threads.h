// Runs a probe on several threads at the same moment.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

// Calls work(0) .. work(threads - 1), each on a thread of its own, the first on the caller's. Returns the
// seconds from the first start to the last end: creating and joining the threads costs the figure nothing.
template <class Work>
double seconds_on_threads(int threads, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> starts(threads);
  std::vector<Clock::time_point> ends(threads);
  std::atomic<int> ready{0};
  const auto run = [&](int t) {
    ++ready;
    while (ready < threads) std::this_thread::yield();
    starts[t] = Clock::now();
    work(t);
    ends[t] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& other : others) other.join();
  const auto first = *std::min_element(starts.begin(), starts.end());
  const auto last = *std::max_element(ends.begin(), ends.end());
  return std::chrono::duration<double>(last - first).count();
}
