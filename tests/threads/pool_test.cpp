// The pool of threads without Python or torch: counts what it ran, from several callers at once, while other threads
// keep every CPU busy. Prints one line for each check that passed and exits with 1 at the first that did not.

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "run/thread_pool.h"

using bitnet_ops::kMostParts;
using bitnet_ops::run_parts;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// Rounds of an empty loop that a part takes. Short parts meet at the beginning and at the end of calls, during long ones
// the system takes CPUs away.
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
  cpu_set_t worker_cpus;
};

void meet(const void* context, int64_t /*part*/) {
  Meeting& meeting = *const_cast<Meeting*>(static_cast<const Meeting*>(context));
  if (std::this_thread::get_id() != meeting.caller) {
    expect(sched_getaffinity(0, sizeof meeting.worker_cpus, &meeting.worker_cpus) == 0, "sched_getaffinity");
  }
  meeting.there.fetch_add(1);
  while (meeting.there.load() < 2) std::this_thread::yield();
}

void check_meeting() {
  cpu_set_t cpus;
  expect(sched_getaffinity(0, sizeof cpus, &cpus) == 0, "sched_getaffinity");
  for (const int rest_ms : {0, 0, 5, 5, 5}) {  // the first time it begins its life, later it is awake or asleep
    std::this_thread::sleep_for(std::chrono::milliseconds(rest_ms));
    Meeting meeting;
    const int cpu = sched_getcpu();
    run_parts(2, 2, meet, &meeting);
    if (rest_ms == 0 || sched_getcpu() != cpu) continue;
    if (CPU_COUNT(&cpus) > 1) CPU_CLR(cpu, &cpus);
    expect(CPU_EQUAL(&meeting.worker_cpus, &cpus) != 0, "a worker may run where its caller may, but for its own CPU");
    CPU_SET(cpu, &cpus);
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

void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    check_meeting();
    check_many_calls(7, 50);
    _exit(0);
  }
  int status = 0;
  expect(waitpid(child, &status, 0) == child && status == 0, "a forked child");
  check_many_calls(8, 50);
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
  passed("nested calls");
  check_one_cpu();
  passed("one CPU");
  {
    const OtherWork other_work;
    part_rounds = 100000;
    check_callers(1, calls / 20);
    check_callers(3, calls / 40);
    part_rounds = 200;
    check_one_cpu();
  }
  passed("busy CPUs");
  check_fork();
  passed("fork");
}
