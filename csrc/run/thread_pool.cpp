#include "run/thread_pool.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "platform/processor.h"
#include "platform/system.h"

namespace bitnet_ops {
namespace {

using Work = void (*)(const void*, int64_t);
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// ---- waiting --------------------------------------------------------------------------------------

// How long a worker looks for work before it sleeps. Nearly all gaps between the regions of a decoded token are
// shorter, and to wake a thread on an idle core of a virtual machine takes 20 to 90 us (bench/LOG.md).
constexpr microseconds kPatience{200};
// Halved whenever nothing came, down to this: where gaps are longer, looking only burns the processor.
constexpr microseconds kLeastPatience{10};
// How long the caller looks for the end of parts that others have begun, before it asks whether those run at all.
constexpr microseconds kPatienceWithOthers{50};
// Who looks for something sees the clock more often than this, unless the system took its processor away.
constexpr microseconds kInterruption{100};
constexpr int kLooksPerClock = 16;  // reading the clock takes as long as a look or two

// Looks for `patience` at most, less where others need this processor. Whether it was done.
template <class Done>
bool look(microseconds patience, const Done& done) {
  const Clock::time_point begin = Clock::now();
  for (Clock::time_point before = begin, now = begin; now - begin < patience && now - before < kInterruption;) {
    for (int i = 0; i < kLooksPerClock; ++i) {
      if (done()) return true;
      spin_pause();
    }
    before = now;
    now = Clock::now();
  }
  return done();
}

// ---- one worker -----------------------------------------------------------------------------------

// A thread of the pool. Which CPU it runs on and whether it runs are questions of the pool's current caller.
class Worker {
 public:
  explicit Worker(int64_t number) : number(number) {}

  const int64_t number;
  SleepWord asleep{0};  // 1 while it sleeps, or is about to
  std::atomic<bool> at_work{false};  // it may have begun a part that has not ended
  ThreadHandle thread;

  // Whether it is at work and has not run since the last time it was, and was asked.
  bool is_stuck() {
    if (!at_work.load(std::memory_order_acquire)) return false;
    const uint64_t before = time_run_;
    time_run_ = thread.time_run();
    return time_run_ != 0 && time_run_ == before;
  }

 private:
  uint64_t time_run_ = 0;
};

// ---- all of them ----------------------------------------------------------------------------------

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
  static constexpr uint64_t kField = kMostParts;
  static uint32_t parts_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 16 & kField); }
  static uint32_t next_of(uint64_t ticket) { return static_cast<uint32_t>(ticket & kField); }

  static constexpr int64_t kCaller = -1;

  void share(int64_t threads, int64_t parts, Work work, const void* context) {
    const int64_t helpers = hire(threads - 1);
    work_.store(work, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    float_control_.store(float_control(), std::memory_order_relaxed);
    helpers_.store(helpers, std::memory_order_relaxed);
    ended_.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    // Sequentially consistent, like asleep: either a worker sees this ticket or it is seen to sleep.
    ticket_.store(number << 32 | static_cast<uint64_t>(parts) << 16);
    // Left to itself, the system often wakes a thread on the processor of the one who wakes it, above all on a virtual
    // machine whose other processor has been idle for a while; the two then share one for milliseconds (bench/LOG.md).
    const Processors processors = processors_beside_caller();
    for (int64_t i = 0; i < helpers; ++i) {
      Worker& worker = *workers_[static_cast<size_t>(i)];
      worker.thread.run_on(processors);
      if (worker.asleep.load() != 0 && worker.asleep.exchange(0) != 0) wake_one(worker.asleep);
    }
    take_parts(kCaller);
    await_end(static_cast<uint32_t>(parts), helpers);
    const std::exception_ptr error = error_;
    error_ = nullptr;
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

  // Sees to it that there are so many workers, or as many as the system has threads and memory for. How many there are.
  int64_t hire(int64_t wanted) noexcept {
    while (static_cast<int64_t>(workers_.size()) < wanted) {
      const size_t before = workers_.size();
      try {
        workers_.push_back(std::make_unique<Worker>(static_cast<int64_t>(before)));
        std::thread(&Pool::serve, this, std::ref(*workers_.back())).detach();
      } catch (const std::exception&) {  // std::system_error or std::bad_alloc
        workers_.resize(before);
        return static_cast<int64_t>(before);
      }
    }
    return wanted;
  }

  // A part that somebody has begun can last: on a busy machine its worker may have lost its CPU, for some
  // milliseconds each time. Then it gets the caller's, which has nothing else to do.
  void await_end(uint32_t parts, int64_t helpers) {
    const auto ended = [&] { return ended_.load(std::memory_order_acquire) == parts; };
    while (!look(kPatienceWithOthers, ended)) {
      bool lends = false;
      const Processors own = processor_of_caller();
      for (int64_t i = 0; i < helpers; ++i) {
        Worker& worker = *workers_[static_cast<size_t>(i)];
        if (!worker.is_stuck()) continue;
        worker.thread.run_on(own);
        lends = true;
      }
      if (!lends) continue;
      caller_sleeps_.store(true);
      for (uint32_t now; (now = ended_.load()) != parts;) sleep_at(ended_, now);
      caller_sleeps_.store(false);
    }
  }

  bool has_work(int64_t worker) const {
    const uint64_t ticket = ticket_.load();
    return next_of(ticket) < parts_of(ticket) && worker < helpers_.load(std::memory_order_relaxed);
  }

  // Takes parts of the current work until none is left, if this worker (or the caller) may. Whether it woke the caller.
  bool take_parts(int64_t worker) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (next_of(ticket) < parts_of(ticket)) {
      const Work work = work_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const uint64_t control = float_control_.load(std::memory_order_relaxed);
      if (worker >= helpers_.load(std::memory_order_relaxed)) return false;
      // If it succeeds, the work is still the one that was read: it cannot end before this part has.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      set_float_control(control);
      try {
        work(context, next_of(ticket));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        error_ = std::current_exception();
      }
      // Sequentially consistent, like caller_sleeps_: either the caller sees the end or it is seen to sleep.
      if (ended_.fetch_add(1) + 1 == parts_of(ticket) && caller_sleeps_.load()) {
        wake_one(ended_);
        return true;
      }
      ticket = ticket_.load(std::memory_order_acquire);
    }
    return false;
  }

  void serve(Worker& worker) {
    worker.thread.introduce_caller("bitnet_ops");
    const auto found_work = [&] { return has_work(worker.number); };
    microseconds patience = kPatience;
    for (;;) {
      worker.at_work.store(true, std::memory_order_release);
      const bool runs_on_lent_cpu = take_parts(worker.number);
      worker.at_work.store(false, std::memory_order_release);
      const Clock::time_point end = Clock::now();
      if (runs_on_lent_cpu || !look(patience, found_work)) {
        worker.asleep.store(1);
        if (found_work()) worker.asleep.store(0);
        while (worker.asleep.load() != 0) sleep_at(worker.asleep, 1);
      }
      const microseconds half = patience / 2;
      patience = Clock::now() - end < kPatience ? kPatience : half < kLeastPatience ? kLeastPatience : half;
    }
  }

  std::atomic<bool> busy_{false};  // held by the caller whose work is current
  std::atomic<uint64_t> ticket_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint64_t> float_control_{0};  // the caller's: bits must not depend on who calculates
  std::atomic<int64_t> helpers_{0};  // workers that may take part
  SleepWord ended_{0};               // parts
  std::atomic<bool> caller_sleeps_{false};
  std::vector<std::unique_ptr<Worker>> workers_;  // under busy_

  std::mutex error_mutex_;
  std::exception_ptr error_;  // read when all parts have ended
};

// Never destroyed: workers wait on it until the process ends.
std::atomic<Pool*> pool{nullptr};

// A forked child has none of its parent's threads: it starts with a pool of its own. Registered when this is loaded,
// because a child that is forked while another thread registers would wait for ever for the end of that.
const bool forked_children_start_anew = (call_in_forked_children([] { pool.store(nullptr); }), true);

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
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
