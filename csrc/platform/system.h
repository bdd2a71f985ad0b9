// What is asked of an operating system beyond standard C++: memory, files, sleep, and a say in where threads run. Each
// system has a file with its name; what several do alike has one of its own (setup.py lists them). What a system
// cannot do is left undone there, where a function here allows it.
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

size_t page_bytes();

// Whether find_resident_pages knows anything.
bool knows_resident_pages();

// Whether pages of this process are in its memory or swapped out of it, rather than not looked at yet: is[i] for page
// number first + i, which begins at address (first + i) * page_bytes(). True where that is not known.
void find_resident_pages(uintptr_t first, size_t count, bool* is);

struct ByteRange {
  uintptr_t begin, end;
};

// The same for all pages from address `begin` to `end`, page by page, in a few microseconds where few are resident:
// writes at most `most` ranges of resident pages and returns how many there are, or -1 where there are more or where
// the system cannot say.
int find_resident_ranges(uintptr_t begin, uintptr_t end, ByteRange* ranges, int most);

// ---- files ----------------------------------------------------------------------------------------

// Reads bytes of an open file; false where it cannot, or where the file ends before.
bool read_at(int descriptor, int64_t offset, void* out, size_t bytes);

void close_file(int descriptor);

// ---- registers ------------------------------------------------------------------------------------

// Asks for the registers of AMX, which a system lends to a process on request; whether it has them then. Only where the
// CPU has AMX.
bool may_use_amx();

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
  uint64_t words[16];  // Linux: a bit for each; Windows: a bit for each in the first word
};

// Where other threads that work for the calling one shall run: where it may itself, but not on the processor where it
// is.
Processors processors_beside_caller();

// Only the processor where the calling thread is.
Processors processor_of_caller();

// How many there are in a set.
int64_t count_of(const Processors& processors);

// The number of the processor where the calling thread is, in a few nanoseconds; always the same where a system does
// not say.
int64_t processor_number_of_caller();

// What others know of a thread.
class ThreadHandle {
 public:
  // The thread's own first act. The handle must live as long as the thread.
  void introduce_caller(const char* name);

  // Keeps the thread on these processors. Does nothing where that is how things are already, before the thread has
  // introduced itself, and on systems that place threads as they like. One caller at a time. False if it has to be
  // asked again, once the thread has introduced itself.
  bool run_on(const Processors& processors);

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
