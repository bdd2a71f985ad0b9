// Runs attention: stores the new keys and values, then shares heads, blocks of tokens and spans of keys out among
// threads. Between the operators, which check arguments, and the kernels, which know no threads.
#pragma once

#include "kernels/kernel_table.h"

namespace bitnet_ops {

// Positions (start to start + tokens) lie within the tables of angles and within the cache.
void run_attention(const Attention& attention);

}  // namespace bitnet_ops
