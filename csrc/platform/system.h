// What is asked of an operating system beyond standard C++: memory, sleep, and a say in where threads run. One file for
// each system has all of it (linux.cpp). What a system cannot do is left undone there, where a function here allows it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace bitnet_ops {

// ---- memory ---------------------------------------------------------------------------------------

// Memory at a multiple of `alignment`, a power of two; null where there is none. Ended by free_aligned.
void* allocate_aligned(size_t alignment, size_t bytes);

void free_aligned(void* memory);

// Asks for large pages for memory that has not been written yet. Only a wish: a system may do nothing.
void prefer_huge_pages(void* begin, size_t bytes);

// ---- sleep ----------------------------------------------------------------------------------------

using SleepWord = std::atomic<uint32_t>;

// Sleeps until wake_one(), unless the word has another value already. May also end for no reason.
void sleep_at(SleepWord& word, uint32_t value);

// Wakes one thread that sleeps at the word, if any does.
void wake_one(SleepWord& word);

// ---- threads --------------------------------------------------------------------------------------

// A set of processors, in whatever form the system has for one. Empty where a system has no such thing, or has more
// processors than a set can hold.
struct Processors {
  uint64_t words[16];  // Linux: a bit for each
};

// Where other threads that work for the calling one shall run: where it may itself, but not on the processor where it
// is.
Processors processors_beside_caller();

// Only the processor where the calling thread is.
Processors processor_of_caller();

// What others know of a thread.
class ThreadHandle {
 public:
  // The thread's own first act. The handle must live as long as the thread.
  void introduce_caller(const char* name);

  // Keeps the thread on these processors. Does nothing where that is how things are already, before the thread has
  // introduced itself, and on systems that place threads as they like. One caller at a time.
  void run_on(const Processors& processors);

  // A number that grows while the thread runs, finely enough to tell whether it has within some 50 us; 0 where it is
  // not known. Only after the thread has introduced itself.
  uint64_t time_run() const;

 private:
  std::atomic<uint64_t> id_{0};  // whatever the system calls the thread; 0: not introduced yet
  uint64_t clock_ = 0;           // likewise its clock; 0: none
  Processors processors_{};
};

// Has `work` run in each forked child, on the one thread that it has, before anything else of ours. Does nothing on
// systems without fork.
void call_in_forked_children(void (*work)());

// Has `before` run before each fork, and `after` behind it, in the parent and in the child: what is locked in between
// is not locked for ever in the child. Does nothing on systems without fork.
void call_around_forks(void (*before)(), void (*after)());

}  // namespace bitnet_ops
