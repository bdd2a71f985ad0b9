// Runs the AVX-VNNI kernel on a CPU that has VNNI only in its AVX-512 form.
//
// The one instruction of that kernel which such a CPU refuses is vpdpbusd in VEX encoding. It raises
// SIGILL; the handler here decodes it, does its arithmetic in plain C++ on the registers that the
// kernel saved with the signal, and steps over it. So the kernel's real machine code runs, all of it.
#pragma once

#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace vex_emulation {

inline volatile long executed = 0;

// Offset of the upper halves of ymm0-15 in the XSAVE area: CPUID leaf 13, subleaf 2. 576 everywhere.
inline uint32_t ymm_high_offset = 0;

constexpr uint32_t kXmmOffset = 160;     // FXSAVE area: xmm0-15, 16 bytes each
constexpr uint32_t kXstateBv = 512;      // XSAVE header: which components are not in their initial state
constexpr uint64_t kComponentSse = 0x2;  // bit 1: xmm
constexpr uint64_t kComponentAvx = 0x4;  // bit 2: upper halves of ymm

struct Registers {
  uint8_t* area;

  uint64_t components() const {
    uint64_t bits;
    std::memcpy(&bits, area + kXstateBv, sizeof bits);
    return bits;
  }

  void read(int index, uint8_t* ymm) const {
    std::memset(ymm, 0, 32);  // a component in its initial state is zero, whatever its bytes say
    if (components() & kComponentSse) std::memcpy(ymm, area + kXmmOffset + 16 * index, 16);
    if (components() & kComponentAvx) std::memcpy(ymm + 16, area + ymm_high_offset + 16 * index, 16);
  }

  void write(int index, const uint8_t* ymm, int bytes) {
    if ((components() & kComponentSse) == 0) std::memset(area + kXmmOffset, 0, 256);
    if ((components() & kComponentAvx) == 0) std::memset(area + ymm_high_offset, 0, 256);
    const uint64_t bits = components() | kComponentSse | kComponentAvx;
    std::memcpy(area + kXstateBv, &bits, sizeof bits);
    uint8_t full[32] = {};  // a VEX instruction on xmm clears the upper half
    std::memcpy(full, ymm, static_cast<size_t>(bytes));
    std::memcpy(area + kXmmOffset + 16 * index, full, 16);
    std::memcpy(area + ymm_high_offset + 16 * index, full + 16, 16);
  }
};

// General registers by their number in the instruction encoding.
inline uint64_t general_register(const ucontext_t* context, int number) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context->uc_mcontext.gregs[kOrder[number]]);
}

[[noreturn]] inline void not_ours(const uint8_t* code) {
  std::fprintf(stderr, "SIGILL at an instruction that is no VEX vpdpbusd: %02x %02x %02x %02x %02x\n", code[0], code[1],
               code[2], code[3], code[4]);
  std::abort();
}

inline int32_t displacement32(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// VEX.66.0F38.W0 50 /r:   c4 | R X B mmmmm | W vvvv L pp | 50 | modrm [sib] [disp]
inline void on_sigill(int, siginfo_t*, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  const bool vex3_0f38 = code[0] == 0xc4 && (code[1] & 0x1f) == 2;
  const bool w0_66 = (code[2] & 0x83) == 0x01;
  if (!vex3_0f38 || !w0_66 || code[3] != 0x50) not_ours(code);
  const int high_reg = code[1] & 0x80 ? 0 : 8;  // R, X, B are stored inverted
  const int high_index = code[1] & 0x40 ? 0 : 8;
  const int high_base = code[1] & 0x20 ? 0 : 8;
  const int first = (~code[2] >> 3) & 0xf;  // vvvv, inverted too
  const int bytes = code[2] & 0x04 ? 32 : 16;
  const int mode = code[4] >> 6;
  const int destination = ((code[4] >> 3) & 7) | high_reg;
  const int rm = code[4] & 7;
  const uint8_t* next = code + 5;

  Registers registers{reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)};
  uint8_t acc[32], unsigned_bytes[32], signed_bytes[32];
  registers.read(destination, acc);
  registers.read(first, unsigned_bytes);
  if (mode == 3) {
    registers.read(rm | high_base, signed_bytes);
  } else {
    uint64_t address = 0;
    bool rip_relative = false;
    bool no_base = false;
    if (rm == 4) {
      const int sib = *next++;
      const int index = ((sib >> 3) & 7) | high_index;
      if (index != 4) address += general_register(context, index) << (sib >> 6);
      no_base = (sib & 7) == 5 && mode == 0;
      if (!no_base) address += general_register(context, (sib & 7) | high_base);
    } else if (rm == 5 && mode == 0) {
      rip_relative = true;
    } else {
      address += general_register(context, rm | high_base);
    }
    if (mode == 1) {
      address += static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(*next)));
      next += 1;
    } else if (mode == 2 || rip_relative || no_base) {
      address += static_cast<uint64_t>(static_cast<int64_t>(displacement32(next)));
      next += 4;
    }
    if (rip_relative) address += reinterpret_cast<uint64_t>(next);
    std::memcpy(signed_bytes, reinterpret_cast<const void*>(address), static_cast<size_t>(bytes));
  }
  for (int lane = 0; lane < bytes / 4; ++lane) {
    uint32_t sum;  // unsigned: the instruction wraps
    std::memcpy(&sum, acc + 4 * lane, sizeof sum);
    for (int j = 4 * lane; j < 4 * lane + 4; ++j) {
      sum += static_cast<uint32_t>(static_cast<int32_t>(unsigned_bytes[j]) * static_cast<int8_t>(signed_bytes[j]));
    }
    std::memcpy(acc + 4 * lane, &sum, sizeof sum);
  }
  registers.write(destination, acc, bytes);
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(next);
  executed = executed + 1;
}

inline void install() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid_count(13, 2, &eax, &ebx, &ecx, &edx)) std::abort();
  ymm_high_offset = ebx;
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) std::abort();
}

}  // namespace vex_emulation
