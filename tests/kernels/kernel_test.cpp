// Compares every kernel of every table with the scalar table, bit for bit, without Python or torch.
//
// Built and run by tests/test_kernels.py, plain and under the address and undefined-behaviour
// sanitizers: every buffer here has exactly the size that kernel_table.h promises a kernel.
// Prints which instruction set is chosen, one line for each, and a hash of what the layers of a decoder gave; the exit
// status is the number of tables that differ.

#include <cstdio>
#include <cstring>

#include "platform/cpu_features.h"
#include "run/dispatch.h"
#include "kernel_test.h"
#if defined(__x86_64__) && defined(__linux__)
#include "reencode_vpdpbusd.h"
#endif

using namespace bitnet_ops;
using namespace bitnet_ops::kernel_test;

namespace {

void test_table() {
  test_rows();
  test_products();
  test_logits();
  test_screens();
  test_attention();
  test_decoder();
}

}  // namespace

int main() {
  size_t count;
  const Candidate* list = candidates(&count);
  for (size_t i = 0; i < count; ++i) {
    if (std::strcmp(list[i].table->isa, "scalar") == 0) scalar = list[i].table;
  }
  std::printf("chosen: %s\n", kernels().isa);
  tested = scalar;
  test_layouts();
  int failed = differences != 0;
  for (size_t i = 0; i < count; ++i) {
    tested = list[i].table;
    comparisons = differences = 0;
    bool runs = list[i].supported;
    long reencoded = 0;
#if defined(__x86_64__) && defined(__linux__)
    const bool reencodes = !runs && std::strcmp(tested->isa, "avx_vnni") == 0 && vpdpbusd::has_evex_form();
    if (reencodes) vpdpbusd::install();
    runs = runs || reencodes;
#endif
    if (!runs) {
      std::printf("%s: not supported by this CPU\n", tested->isa);
      continue;
    }
    test_table();
#if defined(__x86_64__) && defined(__linux__)
    if (reencodes) reencoded = vpdpbusd::reencoded;
    if (reencodes && reencoded == 0) report("no instruction was written anew: this kernel");
#endif
    std::printf("%s: %ld comparisons, %ld differences", tested->isa, comparisons, differences);
    if (reencoded != 0) std::printf(", %ld instructions written anew", reencoded);
    std::printf("\n");
    failed += differences != 0;
  }
  std::printf("signature: %016llx\n", static_cast<unsigned long long>(decoder_signature));
  return failed;
}
