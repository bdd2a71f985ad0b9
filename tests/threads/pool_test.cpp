// The pool of threads without Python or torch: counts what it ran, from several callers at once, while other threads
// keep every CPU busy. Prints one line for each check that passed and exits with 1 at the first that did not.
// Elsewhere than on Linux there are fewer: affinity and forks are looked at there only.

#if defined(__linux__)
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "run/thread_pool.h"

using bitnet_ops::kMostParts;
using bitnet_ops::run_parts;

#if defined(__linux__)

namespace {

// What this thread may still allocate before memory is short; without end where it is negative.
thread_local int allocations_left = -1;

}  // namespace

void* operator new(size_t bytes) {
  void* memory = allocations_left == 0 ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  return memory;
}

void* operator new(size_t bytes, std::align_val_t alignment) {
  const size_t unit = static_cast<size_t>(alignment);
  void* memory = allocations_left == 0 ? nullptr : std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
  if (memory == nullptr) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t /*bytes*/) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
void operator delete(void* memory, size_t /*bytes*/, std::align_val_t /*alignment*/) noexcept { std::free(memory); }

#endif

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// Rounds of an empty loop that a part takes. Short parts meet at the beginning and at the end of calls, during long
// ones the system takes CPUs away.
std::atomic<int> part_rounds{200};

// What one call of run_parts did.
struct Account {
  explicit Account(int64_t parts) : runs(static_cast<size_t>(parts)) {}

  std::vector<std::atomic<int>> runs;  // of each part
  std::atomic<int> running{0};
  std::atomic<int> most_running{0};
  int64_t throwing_part = -1;
};

void work(const void* context, int64_t part) {
  Account& account = *const_cast<Account*>(static_cast<const Account*>(context));
  const int running = account.running.fetch_add(1) + 1;
  int most = account.most_running.load();
  while (most < running && !account.most_running.compare_exchange_weak(most, running)) {
  }
  const int rounds = part_rounds.load(std::memory_order_relaxed);
  for (volatile int i = 0; i < rounds; i = i + 1) {
  }
  account.runs[static_cast<size_t>(part)].fetch_add(1);
  account.running.fetch_sub(1);
  if (part == account.throwing_part) throw std::runtime_error("this part");
}

void check_call(int64_t threads, int64_t parts, int64_t throwing_part = -1) {
  Account account(parts);
  account.throwing_part = throwing_part;
  bool threw = false;
  try {
    run_parts(threads, parts, work, &account);
  } catch (const std::runtime_error&) {
    threw = true;
  }
  expect(threw == (throwing_part >= 0), "an exception reaches the caller, and only that one's");
  expect(account.running.load() == 0, "every part has ended when the call has");
  expect(account.most_running.load() <= threads, "no more threads than asked for");
  // Who throws while it works alone leaves the rest.
  for (const std::atomic<int>& runs : account.runs) expect(runs.load() == 1 || threw, "every part runs once");
}

void check_many_calls(unsigned seed, int calls) {
  for (int i = 0; i < calls; ++i) {
    seed = seed * 1103515245 + 12345;
    const int64_t threads = 1 + (seed >> 16) % 5;
    const int64_t parts = 1 + (seed >> 8) % 40;
    check_call(threads, parts, i % 50 == 0 ? parts - 1 : -1);
  }
}

// Two parts that wait for each other: one thread alone would never come to the end.
struct Meeting {
  std::atomic<int> there{0};
  const std::thread::id caller = std::this_thread::get_id();
#if defined(__linux__)
  cpu_set_t worker_cpus;
#endif
};

void meet(const void* context, int64_t /*part*/) {
  Meeting& meeting = *const_cast<Meeting*>(static_cast<const Meeting*>(context));
#if defined(__linux__)
  if (std::this_thread::get_id() != meeting.caller) {
    expect(sched_getaffinity(0, sizeof meeting.worker_cpus, &meeting.worker_cpus) == 0, "sched_getaffinity");
  }
#endif
  meeting.there.fetch_add(1);
  while (meeting.there.load() < 2) std::this_thread::yield();
}

void check_meeting() {
#if defined(__linux__)
  cpu_set_t cpus;
  expect(sched_getaffinity(0, sizeof cpus, &cpus) == 0, "sched_getaffinity");
#endif
  for (const int rest_ms : {0, 0, 5, 5, 5}) {  // the first time it begins its life, later it is awake or asleep
    std::this_thread::sleep_for(std::chrono::milliseconds(rest_ms));
    Meeting meeting;
#if defined(__linux__)
    const int cpu = sched_getcpu();
#endif
    run_parts(2, 2, meet, &meeting);
#if defined(__linux__)
    if (rest_ms == 0 || sched_getcpu() != cpu) continue;
    if (CPU_COUNT(&cpus) > 1) CPU_CLR(cpu, &cpus);
    expect(CPU_EQUAL(&meeting.worker_cpus, &cpus) != 0, "a worker may run where its caller may, but for its own CPU");
    CPU_SET(cpu, &cpus);
#endif
  }
}

void nested(const void* /*context*/, int64_t /*part*/) { check_call(3, 8); }

// Keeps all CPUs busy with twice as many threads.
class OtherWork {
 public:
  OtherWork() {
    for (unsigned i = 0; i < 2 * std::thread::hardware_concurrency(); ++i) {
      threads_.emplace_back([this] {
        while (!over_.load(std::memory_order_relaxed)) {
        }
      });
    }
  }
  ~OtherWork() {
    over_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> over_{false};
  std::vector<std::thread> threads_;
};

void check_callers(int callers, int calls) {
  std::vector<std::thread> threads;
  for (int t = 0; t < callers; ++t) {
    threads.emplace_back([=] { check_many_calls(static_cast<unsigned>(t) + 1, calls); });
  }
  for (std::thread& thread : threads) thread.join();
}

// The part that waits for all others: its thread has a share, and those parts must find another one.
struct Waiting {
  int64_t parts, waiting_part;
  std::atomic<int64_t> ended{0};
};

void wait_for_others(const void* context, int64_t part) {
  Waiting& waiting = *const_cast<Waiting*>(static_cast<const Waiting*>(context));
  if (part == waiting.waiting_part) {
    while (waiting.ended.load() != waiting.parts - 1) std::this_thread::yield();
  }
  waiting.ended.fetch_add(1);
}

void check_stealing() {
  for (const int64_t parts : {2, 3, 8, 100}) {
    for (int64_t part = 0; part < parts; part += parts / 2) {  // the first of each share, and others
      Waiting waiting{parts, part};
      run_parts(2, parts, wait_for_others, &waiting);
      expect(waiting.ended.load() == parts, "a thread without parts takes those of one who is late");
    }
  }
}

void throw_nested(const void* /*context*/, int64_t /*part*/) {
  Account account(4);
  account.throwing_part = 2;
  run_parts(2, 4, work, &account);
}

void check_nested_exception() {
  bool threw = false;
  try {
    run_parts(2, 4, throw_nested, nullptr);
  } catch (const std::runtime_error&) {
    threw = true;
  }
  expect(threw, "an exception passes through nested calls");
  check_meeting();
}

// A meeting where each finds out how its processor rounds.
struct Rounding {
  std::atomic<int> there{0};
  std::atomic<int> rounded_down{0};
};

void round_third(const void* context, int64_t /*part*/) {
  Rounding& rounding = *const_cast<Rounding*>(static_cast<const Rounding*>(context));
  volatile float one = 1.0f, three = 3.0f;
  const volatile float third = one / three;
  if (third < 0x1.555556p-2f) rounding.rounded_down.fetch_add(1);
  rounding.there.fetch_add(1);
  while (rounding.there.load() < 2) std::this_thread::yield();
}

void check_rounding() {
  for (const int mode : {FE_TONEAREST, FE_DOWNWARD, FE_TONEAREST}) {
    std::fesetround(mode);
    Rounding rounding;
    run_parts(2, 2, round_third, &rounding);
    expect(rounding.rounded_down.load() == (mode == FE_DOWNWARD ? 2 : 0), "workers calculate as their caller does");
  }
}

#if defined(__linux__)

template <class Checks>
void expect_good_child(const Checks& checks) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(100);  // a child that hangs dies
    checks();
    _exit(0);
  }
  int status = 0;
  expect(waitpid(child, &status, 0) == child && status == 0, "a forked child");
}

void check_some_calls() {
  check_meeting();
  check_many_calls(7, 50);
}

void check_fork() {
  expect_good_child(check_some_calls);
  check_many_calls(8, 50);
}

// A child has no workers yet, and wants one. Its pool itself is there already.
void check_short_memory() {
  for (int allocations = 0; allocations < 4; ++allocations) {
    expect_good_child([=] {
      check_call(1, 1);
      Account account(100);
      allocations_left = allocations;
      bool threw = false;
      try {
        run_parts(2, 100, work, &account);
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      allocations_left = -1;
      expect(!threw, "fewer workers where memory is short, and no error");
      for (const std::atomic<int>& runs : account.runs) expect(runs.load() == 1, "every part runs once");
      check_meeting();
    });
  }
}

// GCC's thread sanitizer takes new threads of a child for running ones of the parent.
#if defined(__SANITIZE_THREAD__)
constexpr bool kFindsRaces = true;
#else
constexpr bool kFindsRaces = false;
#endif

// A child gets none of its parent's threads, so nobody will ever end the work that was under way. That work allocates
// nothing, because the allocators of some sanitizers do not survive a fork meanwhile.
void check_fork_during_work() {
  std::atomic<bool> over{false};
  std::atomic<int> began{0};
  std::thread other([&] {
    Account account(40);
    while (!over.load()) {
      run_parts(3, 40, work, &account);
      began.fetch_add(1);
    }
  });
  while (began.load() == 0) std::this_thread::yield();
  part_rounds = 20000;  // nearly all the time is within parts
  for (int i = 0; i < 10; ++i) expect_good_child(check_some_calls);
  part_rounds = 200;
  over = true;
  other.join();
  check_many_calls(10, 50);
}

void check_one_cpu() {
  cpu_set_t all, own;
  expect(sched_getaffinity(0, sizeof all, &all) == 0, "sched_getaffinity");
  CPU_ZERO(&own);
  CPU_SET(sched_getcpu(), &own);
  expect(sched_setaffinity(0, sizeof own, &own) == 0, "sched_setaffinity");
  check_meeting();
  check_many_calls(9, 300);
  expect(sched_setaffinity(0, sizeof all, &all) == 0, "sched_setaffinity");
}

#endif

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 2000;
  const auto passed = [](const char* what) {
    std::printf("%s\n", what);
    std::fflush(stdout);
  };
  check_meeting();
  check_many_calls(1, calls);
  check_call(2, kMostParts);
  passed("one caller");
  check_callers(4, calls / 4);
  passed("four callers");
  run_parts(3, 6, nested, nullptr);
  check_nested_exception();
  passed("nested calls");
  check_stealing();
  passed("stealing");
#if defined(__linux__)
  check_one_cpu();
  passed("one CPU");
#endif
  {
    const OtherWork other_work;
    part_rounds = 100000;
    check_callers(1, calls / 20);
    check_callers(3, calls / 40);
    part_rounds = 200;
#if defined(__linux__)
    check_one_cpu();
#endif
  }
  passed("busy CPUs");
  check_rounding();
  passed("rounding");
#if defined(__linux__)
  check_fork();
  passed("fork");
  check_short_memory();
  passed("short memory");
  if (!kFindsRaces) {
    check_fork_during_work();
    passed("fork during work");
  }
#endif
}
