// How fast a core multiplies bytes: the limit of prefill. Part of the probe library that probes.py builds
// and loads.
//
// Each function below repeats the instruction that one instruction set's kernels stand on, from registers to
// registers and nothing else, in more independent chains than its latency times its rate. Volatile assembly:
// the compiler can neither drop nor merge it.
//
// The library is compiled for the CPU it runs on (-march=native), so an instruction that this CPU lacks is
// not compiled at all.

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

#include "on_threads.h"

namespace {

constexpr int kChains = 12;  // with two operands and one temporary 15 registers, of 16

// Loops over kChains independent chains. INSTRUCTION names its chain %0, its operands %1 and %2; after it come
// the registers it overwrites besides.
#define REPEAT(name, Vector, constraint, INSTRUCTION, ...)                                                            \
  void name(int64_t rounds) {                                                                                         \
    const Vector codes = Vector{} + 0x02;                                                                             \
    const Vector activations = Vector{} + 0x5a;                                                                       \
    Vector chains[kChains] = {};                                                                                      \
    for (int64_t i = 0; i < rounds; ++i) {                                                                            \
      _Pragma("GCC unroll 12") for (Vector& chain : chains) {                                                         \
        asm volatile(INSTRUCTION : "+" constraint(chain) : constraint(codes), constraint(activations) : __VA_ARGS__); \
      }                                                                                                               \
    }                                                                                                                 \
  }

#if defined(__x86_64__)
typedef int8_t Zmm __attribute__((vector_size(64)));
typedef int8_t Ymm __attribute__((vector_size(32)));
#elif defined(__aarch64__)
typedef int8_t Neon __attribute__((vector_size(16)));
#endif

#if defined(__AVX512VNNI__)
REPEAT(vpdpbusd_zmm, Zmm, "v", "vpdpbusd %2, %1, %0")
#endif
#if defined(__AVXVNNI__)
REPEAT(vpdpbusd_ymm, Ymm, "x", "%{vex%} vpdpbusd %2, %1, %0")
#endif
#if defined(__AVX2__)
REPEAT(vpmaddubsw_ymm, Ymm, "x", "vpmaddubsw %2, %1, %0")
// What a kernel has to do at least: the products are not added to anything yet. Not a limit, a comparison.
REPEAT(vpmaddubsw_vpaddw_ymm, Ymm, "x", "vpmaddubsw %2, %1, %%ymm15\n\tvpaddw %%ymm15, %0, %0", "xmm15")
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
// Four sums and four operands, as in the kernel: a product of tiles takes 16 cycles and waits for nothing.
void tdpbsud(int64_t rounds) {
  syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM; the kernels have it already
  struct alignas(64) Shapes {
    uint8_t palette = 1, reserved[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
  for (int64_t i = 0; i < rounds * kChains; i += 4) {
    asm volatile(
        "tdpbsud %tmm6, %tmm4, %tmm0\n\ttdpbsud %tmm7, %tmm4, %tmm1\n\t"
        "tdpbsud %tmm6, %tmm5, %tmm2\n\ttdpbsud %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
}
#endif
#if defined(__ARM_FEATURE_DOTPROD)
REPEAT(sdot, Neon, "w", "sdot %0.4s, %1.16b, %2.16b")
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
REPEAT(smmla, Neon, "w", "smmla %0.4s, %1.16b, %2.16b")
#endif

struct Instruction {
  const char* name;
  int multiplications;
  void (*repeat)(int64_t rounds);
};

constexpr Instruction kInstructions[] = {
#if defined(__AVX512VNNI__)
    {"vpdpbusd zmm", 64, vpdpbusd_zmm},
#endif
#if defined(__AVXVNNI__)
    {"vpdpbusd ymm", 32, vpdpbusd_ymm},
#endif
#if defined(__AVX2__)
    {"vpmaddubsw ymm", 32, vpmaddubsw_ymm},
    {"vpmaddubsw + vpaddw ymm", 32, vpmaddubsw_vpaddw_ymm},
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
    {"tdpbsud", 16 * 16 * 64, tdpbsud},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    {"sdot", 16, sdot},
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    {"smmla", 32, smmla},
#endif
    {nullptr, 0, nullptr},
};

constexpr int64_t kRounds = 1 << 20;  // 3 to 7 ms

}  // namespace

// Multiplications a second of `threads` threads together, one on each of `cpus`; 0 where this CPU lacks the
// instruction.
extern "C" double multiply_rate(const char* name, int threads, const int* cpus) {
  for (const Instruction* i = kInstructions; i->name != nullptr; ++i) {
    if (std::strcmp(name, i->name) != 0) continue;
    const double seconds = seconds_on_threads(threads, cpus, [&](int) { i->repeat(kRounds); });
    return static_cast<double>(kRounds) * kChains * i->multiplications * threads / seconds;
  }
  return 0.0;
}
