// How threads sleep where the system cannot wait for a word to change, or only in versions newer than those that the
// wheel is for: macOS before 14.4. Standard C++, so that the pool's tests run it on Linux, too.
//
//     address of the word  ->  one of kBeds { mutex, condition }
//
// Words that share a bed wake each other, which sleep_at allows.

#include <condition_variable>
#include <mutex>
#include <new>

#include "platform/system.h"

namespace bitnet_ops {
namespace {

struct alignas(128) Bed {
  std::mutex mutex;
  std::condition_variable condition;
};

constexpr size_t kBeds = 64;  // few of the pool's words share one, even with as many workers

// Never destroyed: threads sleep here until the process ends.
struct Beds {
  alignas(Bed) unsigned char memory[kBeds * sizeof(Bed)];

  Beds() { make(); }

  void make() {
    for (size_t i = 0; i < kBeds; ++i) new (memory + i * sizeof(Bed)) Bed;
  }

  Bed& of(const SleepWord& word) {
    const size_t number = reinterpret_cast<uintptr_t>(&word) / 64 * 0x9e3779b97f4a7c15u >> 58;
    return *std::launder(reinterpret_cast<Bed*>(memory + number * sizeof(Bed)));
  }
};
static_assert(kBeds == size_t{1} << (64 - 58), "a number of the bed for each value of its bits");

Beds beds;

// A mutex that another thread held at the fork would stay locked in the child, where that thread is not.
const bool forked_children_start_anew = (call_in_forked_children([] { beds.make(); }), true);

}  // namespace

void sleep_at(SleepWord& word, uint32_t value) {
  Bed& bed = beds.of(word);
  std::unique_lock<std::mutex> lock(bed.mutex);
  if (word.load() == value) bed.condition.wait(lock);
}

void wake_one(SleepWord& word) {
  Bed& bed = beds.of(word);
  // Whoever has seen the old value holds the mutex until it waits, so it cannot miss this.
  {
    const std::lock_guard<std::mutex> lock(bed.mutex);
  }
  bed.condition.notify_all();
}

}  // namespace bitnet_ops
