#include "run/thread_pool.h"

#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

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

// ---- parts ----------------------------------------------------------------------------------------

// A run of parts that belongs to one thread, which takes them from the front; others who have none left take them from
// the back. One word says of which work they are and which are left. Taking a part is a compare-exchange of it, so a
// thread that looked at earlier work cannot take a part of later one.
//     | number of the work: 32 bits | next: 16 | end: 16 |
class Share {
 public:
  static uint32_t work_number(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
  static uint32_t left(uint64_t ticket) { return end(ticket) - next(ticket); }

  void put(uint32_t work_number, int64_t begin, int64_t end) {
    ticket_.store(uint64_t{work_number} << 32 | static_cast<uint64_t>(begin) << 16 | static_cast<uint64_t>(end),
                  std::memory_order_release);
  }

  uint64_t look() const { return ticket_.load(std::memory_order_acquire); }

  // Both say whether the part is the caller's now; if not, `ticket` is what there is instead.
  bool take_first(uint64_t& ticket, int64_t* part) {
    *part = next(ticket);
    return exchange(ticket, ticket + (uint64_t{1} << 16));
  }
  bool take_last(uint64_t& ticket, int64_t* part) {
    *part = int64_t{end(ticket)} - 1;
    return exchange(ticket, ticket - 1);
  }

 private:
  static uint32_t next(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 16 & kMostParts); }
  static uint32_t end(uint64_t ticket) { return static_cast<uint32_t>(ticket & kMostParts); }

  bool exchange(uint64_t& ticket, uint64_t wanted) {
    return ticket_.compare_exchange_weak(ticket, wanted, std::memory_order_acq_rel, std::memory_order_acquire);
  }

  std::atomic<uint64_t> ticket_{0};
};

// ---- one thread -----------------------------------------------------------------------------------

// Two cache lines, because processors fetch them in pairs.
constexpr size_t kApart = 128;

// A worker of the pool, or its current caller, who is number 0. Which CPU a worker runs on and whether it runs are
// questions of the caller.
class alignas(kApart) Member {
 public:
  Share share;
  alignas(kApart) SleepWord asleep{0};  // 1 while it sleeps, or is about to
  std::atomic<bool> at_work{false};     // it may have begun a part that has not ended
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

// More threads than any machine has that this was made for.
constexpr int64_t kMostMembers = 1024;

// How long workers may stay where they are when their caller's set of CPUs has changed.
constexpr microseconds kSurveyAge{1000};

class Pool {
 public:
  void run(int64_t threads, int64_t parts, Work work, const void* context) {
    if (threads > 1 && parts > 1 && !busy_.exchange(true, std::memory_order_acquire)) {
      share_out(threads < parts ? threads : parts, parts, work, context);
      return;
    }
    for (int64_t part = 0; part < parts; ++part) work(context, part);
  }

 private:
  void share_out(int64_t threads, int64_t parts, Work work, const void* context) {
    survey();
    const int64_t members = hire(threads < most_members_ ? threads : most_members_);
    work_.store(work, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    float_control_.store(float_control(), std::memory_order_relaxed);
    members_.store(members, std::memory_order_release);
    parts_.store(static_cast<uint32_t>(parts), std::memory_order_relaxed);
    ended_.store(0, std::memory_order_relaxed);
    ++work_number_;
    for (int64_t i = 0; i < members; ++i) {
      member(i).share.put(work_number_, parts * i / members, parts * (i + 1) / members);
    }
    // Either this sees that a worker goes to sleep, or that worker sees its share: both change this word.
    const bool some_sleep = sleepers_.fetch_add(0, std::memory_order_acq_rel) != 0;
    place(members);
    if (some_sleep) wake_branches(0, members);
    take_parts(0);
    await_end(static_cast<uint32_t>(parts), members);
    const std::exception_ptr error = error_;
    error_ = nullptr;
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

  Member& member(int64_t number) {
    return number == 0 ? caller_ : *workers_[static_cast<size_t>(number)].load(std::memory_order_acquire);
  }

  // Sees to it that there are so many threads with the caller, or as many as the system has threads and memory for. How
  // many there are.
  int64_t hire(int64_t wanted) noexcept {
    for (; hired_ < wanted; ++hired_) {
      try {
        auto fresh = std::make_unique<Member>();
        workers_[static_cast<size_t>(hired_)].store(fresh.get(), std::memory_order_release);
        std::thread(&Pool::serve, this, hired_, work_number_).detach();
        static_cast<void>(fresh.release());  // it serves until the process ends
      } catch (const std::exception&) {      // std::system_error or std::bad_alloc
        return hired_;
      }
    }
    return wanted;
  }

  // Finds out where workers may run, and so how many are of use: those without a processor would only take it from
  // others, who may be within a part. It takes as long as all the rest of a short region, so it is asked anew only now
  // and then, and where the caller is another, is elsewhere, or has lent a worker its processor.
  void survey() {
    static thread_local const char caller = 0;
    const int64_t processor = processor_number_of_caller();
    const Clock::time_point now = Clock::now();
    if (&caller == surveyor_ && processor == surveyed_from_ && now - surveyed_at_ < kSurveyAge) return;
    surveyor_ = &caller;
    surveyed_from_ = processor;
    surveyed_at_ = now;
    processors_ = processors_beside_caller();
    const int64_t count = count_of(processors_);
    most_members_ = count == 0 || count >= kMostMembers ? kMostMembers : count + 1;
    placed_ = 0;
  }

  // Left to itself, the system often wakes a thread on the processor of the one who wakes it, above all on a virtual
  // machine whose other processor has been idle for a while; the two then share one for milliseconds (bench/LOG.md).
  void place(int64_t members) {
    while (placed_ < members - 1 && member(placed_ + 1).thread.run_on(processors_)) ++placed_;
  }

  // To wake a thread takes its waker some microseconds, so those who wake others do so as a tree, each for two.
  void wake_branches(int64_t number, int64_t members) {
    for (int64_t i = 2 * number + 1; i <= 2 * number + 2 && i < members; ++i) wake(member(i));
  }

  static void wake(Member& sleeper) {
    if (sleeper.asleep.load() != 0 && sleeper.asleep.exchange(0) != 0) wake_one(sleeper.asleep);
  }

  // A part that somebody has begun can last: on a busy machine its worker may have lost its CPU, for some
  // milliseconds each time. Then it gets the caller's, which has nothing else to do.
  void await_end(uint32_t parts, int64_t members) {
    const auto ended = [&] { return ended_.load(std::memory_order_acquire) == parts; };
    while (!look(kPatienceWithOthers, ended)) {
      bool lends = false;
      const Processors own = processor_of_caller();
      for (int64_t i = 1; i < members; ++i) {
        Member& worker = member(i);
        if (!worker.is_stuck()) continue;
        worker.thread.run_on(own);
        lends = true;
      }
      if (!lends) continue;
      surveyor_ = nullptr;
      caller_sleeps_.store(true);
      for (uint32_t now; (now = ended_.load()) != parts;) sleep_at(ended_, now);
      caller_sleeps_.store(false);
    }
  }

  // Takes parts of the current work until none is left, if this thread may: its own, then those of others. Whether it
  // woke the caller.
  bool take_parts(int64_t number) {
    bool woke_caller = take_share(number, number);
    const int64_t members = members_.load(std::memory_order_acquire);
    for (int64_t i = 1; i < members; ++i) {
      const int64_t other = number + i < members ? number + i : number + i - members;
      if (take_share(number, other)) woke_caller = true;
    }
    return woke_caller;
  }

  // Takes what is left of the share of `owner`. Whether it woke the caller.
  bool take_share(int64_t number, int64_t owner) {
    Member& of = member(owner);
    const bool own = number == owner;
    uint32_t taken = 0;
    uint32_t parts = 0;  // of all shares
    uint64_t ticket = of.share.look();
    while (Share::left(ticket) != 0) {
      const Work work = work_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const uint64_t control = float_control_.load(std::memory_order_relaxed);
      parts = parts_.load(std::memory_order_relaxed);
      if (number >= members_.load(std::memory_order_relaxed)) break;
      // If it succeeds, the work is still the one that was read: it cannot end before this part has.
      int64_t part;
      if (!(own ? of.share.take_first(ticket, &part) : of.share.take_last(ticket, &part))) continue;
      // Whoever should have woken the owner has no processor himself, perhaps.
      if (!own && Share::left(ticket) > 1) wake(of);
      set_float_control(control);
      try {
        work(context, part);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        error_ = std::current_exception();
      }
      ++taken;
      ticket = of.share.look();
    }
    // Sequentially consistent, like caller_sleeps_: either the caller sees the end or it is seen to sleep.
    if (taken == 0 || ended_.fetch_add(taken) + taken != parts || !caller_sleeps_.load()) return false;
    wake_one(ended_);
    return true;
  }

  void serve(int64_t number, uint32_t seen) {
    Member& self = member(number);
    self.thread.introduce_caller("bitnet_ops");
    const auto found_work = [&] { return Share::work_number(self.share.look()) != seen; };
    microseconds patience = kPatience;
    for (;;) {
      const Clock::time_point begin = Clock::now();
      if (!look(patience, found_work)) sleep_until_woken(self, found_work);
      const microseconds half = patience / 2;
      patience = Clock::now() - begin < kPatience ? kPatience : half < kLeastPatience ? kLeastPatience : half;
      while (found_work()) {
        seen = Share::work_number(self.share.look());
        if (sleepers_.load(std::memory_order_relaxed) != 0) {
          wake_branches(number, members_.load(std::memory_order_acquire));
        }
        self.at_work.store(true, std::memory_order_release);
        const bool runs_on_lent_cpu = take_parts(number);
        self.at_work.store(false, std::memory_order_release);
        if (runs_on_lent_cpu) sleep_until_woken(self, found_work);
      }
    }
  }

  template <class Done>
  void sleep_until_woken(Member& self, const Done& found_work) {
    self.asleep.store(1);
    sleepers_.fetch_add(1, std::memory_order_acq_rel);
    if (found_work()) self.asleep.store(0);
    while (self.asleep.load() != 0) sleep_at(self.asleep, 1);
    sleepers_.fetch_sub(1, std::memory_order_acq_rel);
  }

  std::atomic<bool> busy_{false};  // held by the caller whose work is current

  // Of the current work; written before its shares are.
  alignas(kApart) std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<uint64_t> float_control_{0};  // the caller's: bits must not depend on who calculates
  std::atomic<int64_t> members_{0};         // threads that may take part
  std::atomic<uint32_t> parts_{0};

  alignas(kApart) SleepWord ended_{0};  // parts
  std::atomic<bool> caller_sleeps_{false};
  alignas(kApart) std::atomic<int64_t> sleepers_{0};  // workers that sleep, or are about to

  // Under busy_, but for the places of workers that are at work.
  alignas(kApart) uint32_t work_number_ = 0;
  int64_t hired_ = 1;
  const char* surveyor_ = nullptr;  // the caller who asked, or null if it has to be asked anew
  int64_t surveyed_from_ = 0;       // the processor where that was
  Clock::time_point surveyed_at_;
  Processors processors_{};  // where workers may run
  int64_t most_members_ = 1;
  int64_t placed_ = 0;  // so many workers keep to them
  Member caller_;
  std::array<std::atomic<Member*>, kMostMembers> workers_{};  // the first is not used

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
