#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace bitnet_ops {
namespace {

using Work = void (*)(const void*, int64_t);

// A decoder layer leaves gaps of some 10 us between its parallel regions, and waking a sleeping thread costs as much:
// so a worker looks for work about 50 us before it sleeps (a pause is 10 to 40 ns).
constexpr int kLooksBeforeSleep = 2000;
// The caller looks as long for the end of parts that others have begun, then offers its processor to them.
constexpr int kLooksBeforeYield = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // what other spin locks use: longer than yield, which is no wait on most cores
#endif
}

class Pool {
 public:
  void run(int64_t threads, int64_t parts, Work work, const void* context) {
    if (threads > 1 && parts > 1 && !busy_.exchange(true, std::memory_order_acquire)) {
      share(threads, parts, work, context);
      return;
    }
    for (int64_t part = 0; part < parts; ++part) work(context, part);
  }

 private:
  // One word says which work is current, how many parts it has and which comes next. Taking a part is a
  // compare-exchange of it, so a thread that looked at earlier work cannot take a part of later one.
  //     | number of the work: 32 bits | parts: 16 | next: 16 |
  static constexpr uint64_t kField = 0xffff;
  static int64_t parts_of(uint64_t ticket) { return static_cast<int64_t>(ticket >> 16 & kField); }
  static int64_t next_of(uint64_t ticket) { return static_cast<int64_t>(ticket & kField); }

  void share(int64_t threads, int64_t parts, Work work, const void* context) {
    while (workers_ < threads - 1) {
      std::thread(&Pool::serve, this, workers_).detach();
      ++workers_;
    }
    work_.store(work, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    ended_.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    // Sequentially consistent, like sleepers_: either a worker sees this ticket or it is seen to sleep.
    ticket_.store(number << 32 | static_cast<uint64_t>(parts) << 16);
    if (sleepers_.load() > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take_parts();
    for (int looks = 0; ended_.load(std::memory_order_acquire) != parts; ++looks) {
      if (looks < kLooksBeforeYield) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    const std::exception_ptr error = error_;
    error_ = nullptr;
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

  void take_parts() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (next_of(ticket) < parts_of(ticket)) {
      const Work work = work_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      // If it succeeds, the work is still the one that was read: it cannot end before this part has.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      try {
        work(context, next_of(ticket));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        error_ = std::current_exception();
      }
      ended_.fetch_add(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  bool has_work(int64_t worker) const {
    const uint64_t ticket = ticket_.load();
    return next_of(ticket) < parts_of(ticket) && worker < helpers_.load(std::memory_order_relaxed);
  }

  void serve(int64_t worker) {
    for (int looks = 0;; ++looks) {
      if (has_work(worker)) {
        take_parts();
        looks = 0;
      } else if (looks < kLooksBeforeSleep) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return has_work(worker); });
        sleepers_.fetch_sub(1);
        looks = 0;
      }
    }
  }

  std::atomic<bool> busy_{false};  // held by the caller whose work is current
  std::atomic<uint64_t> ticket_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> helpers_{0};  // workers that may take part
  std::atomic<int64_t> ended_{0};
  int64_t workers_ = 0;        // under busy_
  std::exception_ptr error_;  // under mutex_, read when all parts have ended

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
};

// Never destroyed: workers wait on it until the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    // A forked child has none of its parent's threads: it starts with a pool of its own.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    static_cast<void>(registered);
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) {
      current = fresh;
    } else {
      delete fresh;
    }
  }
  return *current;
}

}  // namespace

void run_parts(int64_t threads, int64_t parts, Work work, const void* context) {
  the_pool().run(threads, parts, work, context);
}

}  // namespace bitnet_ops
