// How threads sleep on Linux.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "platform/system.h"

namespace bitnet_ops {

static_assert(sizeof(SleepWord) == sizeof(uint32_t), "what the system takes for a futex");

void sleep_at(SleepWord& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_one(SleepWord& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }

}  // namespace bitnet_ops
