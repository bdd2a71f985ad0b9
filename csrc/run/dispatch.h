// Which kernels run: the candidates of this architecture, the choice, and its override.
#pragma once

#include <cstddef>

#include "kernels/kernel_table.h"

namespace bitnet_ops {

struct Candidate {
  const KernelTable* table;
  bool supported;  // by this CPU and operating system
};

// Candidates of this architecture, best first. `count` is at least one: scalar is always there.
const Candidate* candidates(size_t* count);

// The table in use: the best supported one, or the one that select() named.
const KernelTable& kernels();

// Makes the named table the one in use. False, and no change, if it is unknown or not supported.
bool select(const char* isa);

}  // namespace bitnet_ops
