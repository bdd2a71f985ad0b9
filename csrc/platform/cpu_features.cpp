#include "platform/cpu_features.h"

#include <cstring>

#include "platform/system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitnet_ops {

#if defined(__x86_64__)

namespace {

// XCR0: the register states that the operating system saves. A CPU may have AVX-512 and the system
// (or a hypervisor) not save its registers; executing it then faults, or corrupts another process.
constexpr uint64_t kSavesYmm = 0x06;       // bits 1 and 2: xmm, upper halves of ymm
constexpr uint64_t kSavesZmm = 0xe6;       // and bits 5 to 7: opmask, upper halves of zmm0-15, zmm16-31
constexpr uint64_t kSavesTiles = 0x60000;  // bits 17 and 18: shapes and contents of AMX's registers
constexpr uint32_t kOsxsave = 1u << 27;    // CPUID.1:ECX, xgetbv may be executed

uint64_t read_xcr0() {
  uint32_t low, high;
  // Written as an instruction because the intrinsic would need -mxsave for the whole file.
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Measured: AMD's Zen 5 reads a token's weights 1.05 to 1.15 times faster with requests towards L1 alone, Intel's
// Sapphire Rapids 1.1 to 1.3 times faster with such towards L2 before them (bench/LOG.md).
bool streams_to_l1() {
  uint32_t eax, name[3];
  if (!__get_cpuid(0, &eax, &name[0], &name[2], &name[1])) return false;
  return std::memcmp(name, "AuthenticAMD", sizeof name) == 0 || std::memcmp(name, "HygonGenuine", sizeof name) == 0;
}

constexpr uint32_t feature_if(uint32_t word, int bit, CpuFeature feature) {
  return (word >> bit) & 1u ? static_cast<uint32_t>(feature) : 0u;
}

}  // namespace

uint32_t cpu_features() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsxsave)) return 0;
  const uint64_t xcr0 = read_xcr0();
  if ((xcr0 & kSavesYmm) != kSavesYmm) return 0;

  uint32_t features = feature_if(ecx, 12, kFma) | feature_if(ecx, 29, kF16c) | (streams_to_l1() ? kStreamsToL1 : 0u);
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const uint32_t highest_subleaf = eax;
  features |= feature_if(ebx, 5, kAvx2);
  if ((xcr0 & kSavesZmm) == kSavesZmm) {
    features |= feature_if(ebx, 16, kAvx512F) | feature_if(ebx, 17, kAvx512Dq) | feature_if(ebx, 30, kAvx512Bw) |
                feature_if(ebx, 31, kAvx512Vl) | feature_if(ecx, 11, kAvx512Vnni) | feature_if(ecx, 1, kAvx512Vbmi);
  }
  if ((xcr0 & kSavesTiles) == kSavesTiles) {
    const uint32_t amx = feature_if(edx, 24, kAmxTile) | feature_if(edx, 25, kAmxInt8);
    // Asked for only where it is there: the system then keeps 8 KB more for each thread that uses it.
    if (amx != 0 && may_use_amx()) features |= amx;
  }
  if (highest_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    features |= feature_if(eax, 4, kAvxVnni);
  }
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)

namespace {

// Whether smmla, which multiplies twice as much as sdot, is also faster. Measured with int8 products from the L1 cache:
// 1.7 times on Neoverse V2, 1.01 times on Apple's M3 (robertknight/rten, pull request 827), where a whole product was
// slower (pull request 824); 0.75 to 0.9 times on M3 Max (JustVugg/colibri, issue 136). So not on Apple's cores.
bool smmla_is_fast(unsigned long hwcap) {
  constexpr unsigned long kHwcapCpuid = 1ul << 11;  // the kernel lets programs read MIDR_EL1
  constexpr uint64_t kApple = 0x61;
  if (!(hwcap & kHwcapCpuid)) return true;
  uint64_t midr;
  __asm__("mrs %0, midr_el1" : "=r"(midr));
  return (midr >> 24 & 0xff) != kApple;  // who made the core
}

// Bits of the kernel's ABI, arch/arm64/include/uapi/asm/hwcap.h, which older system headers lack.
constexpr unsigned long kHwcapCrc32 = 1ul << 7;
constexpr unsigned long kHwcapAtomics = 1ul << 8;
constexpr unsigned long kHwcapAsimdRdm = 1ul << 12;
constexpr unsigned long kHwcapAsimdDp = 1ul << 20;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;

}  // namespace

uint32_t cpu_features() {
  const unsigned long hwcap = getauxval(AT_HWCAP);
  constexpr unsigned long kArmV82Bits = kHwcapCrc32 | kHwcapAtomics | kHwcapAsimdRdm;
  return ((hwcap & kArmV82Bits) == kArmV82Bits ? kArmV82 : 0u) | (hwcap & kHwcapAsimdDp ? kDotprod : 0u) |
         (getauxval(AT_HWCAP2) & kHwcap2I8mm ? kI8mm : 0u) | (smmla_is_fast(hwcap) ? kFastI8mm : 0u);
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {

bool has(const char* name) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value != 0;
}

}  // namespace

uint32_t cpu_features() {
  // Every Apple CPU that runs macOS is armv8.4-a or later. Never kFastI8mm: see smmla_is_fast above.
  return kArmV82 | (has("hw.optional.arm.FEAT_DotProd") ? kDotprod : 0u) |
         (has("hw.optional.arm.FEAT_I8MM") ? kI8mm : 0u);
}

#else

uint32_t cpu_features() { return 0; }

#endif

}  // namespace bitnet_ops
