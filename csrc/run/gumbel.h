// Noise that turns an argmax into a draw: argmax(logit / temperature + noise) follows the softmax (Gumbel, 1954).
#pragma once

#include <cstdint>

namespace bitnet_ops {

// out [rows][size]: row i is the first `size` numbers of the stream of seeds[i].
void run_gumbel_noise(const int64_t* seeds, int64_t rows, int64_t size, float* out);

}  // namespace bitnet_ops
