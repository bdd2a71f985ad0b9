// Runs the AVX-VNNI kernel on a CPU that has VNNI only in its AVX-512 form.
//
// The one instruction of that kernel which such a CPU refuses is vpdpbusd in VEX encoding: it raises SIGILL. The
// handler here writes the same instruction in EVEX encoding into a stub, and over the refused one a jump to it. So
// an instruction is refused once, and the rest of the kernel's machine code runs as it is, at full speed.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "platform/cpu_features.h"

namespace vpdpbusd {

inline long reencoded = 0;

inline bool has_evex_form() {
  using namespace bitnet_ops;
  constexpr uint32_t kNeeded = kAvx2 | kFma | kF16c | kAvx512F | kAvx512Vl | kAvx512Vnni;
  return (cpu_features() & kNeeded) == kNeeded;
}

// Stubs: in the program's own data, hence within reach of a jump. 22 bytes each at most.
constexpr size_t kStubBytes = size_t{1} << 20;
alignas(4096) inline uint8_t stubs[kStubBytes];
inline uint8_t* next_stub = stubs;

[[noreturn]] inline void fail(const char* why, const uint8_t* code) {
  std::fprintf(stderr, "SIGILL: %s: %02x %02x %02x %02x %02x\n", why, code[0], code[1], code[2], code[3], code[4]);
  std::abort();
}

inline void make_writable(const void* begin, size_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(begin) + bytes;
  if (mprotect(reinterpret_cast<void*>(first), end - first, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
    std::perror("mprotect of code");
    std::abort();
  }
}

inline void store32(uint8_t* place, int64_t value) {
  const int32_t narrow = static_cast<int32_t>(value);
  if (narrow != value) std::abort();  // a distance over 2 GB, which the linker would have refused
  std::memcpy(place, &narrow, sizeof narrow);
}

inline int32_t load32(const uint8_t* place) {
  int32_t value;
  std::memcpy(&value, place, sizeof value);
  return value;
}

inline int64_t distance(const uint8_t* from, const uint8_t* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

// jmp rel32: no longer than the shortest VEX vpdpbusd.
constexpr int kJumpBytes = 5;
inline void write_jump(uint8_t* place, const uint8_t* target) {
  place[0] = 0xe9;
  store32(place + 1, distance(place + kJumpBytes, target));
}

//     VEX    c4 | R X B mmmmm    | W vvvv L pp                  | 50 | modrm [sib] [disp]
//     EVEX   62 | R X B R' 0 mmm | W vvvv 1 pp | z L'L b V' aaa | 50 | modrm [sib] [disp]
//
// with R, X, B, R', V' and vvvv inverted, mmm = 2, pp = 1, W = 0. A disp8 would count vectors in EVEX: it becomes a
// disp32.
inline void reencode(uint8_t* code) {
  const bool vex3_0f38 = code[0] == 0xc4 && (code[1] & 0x1f) == 2;
  const bool w0_66 = (code[2] & 0x83) == 0x01;
  if (!vex3_0f38 || !w0_66 || code[3] != 0x50) fail("no VEX vpdpbusd", code);
  if (next_stub + 32 > stubs + kStubBytes) fail("no room for another stub", code);
  const int mode = code[4] >> 6;
  const int rm = code[4] & 7;
  uint8_t* in = code + 5;
  uint8_t* out = next_stub;
  *out++ = 0x62;
  *out++ = static_cast<uint8_t>((code[1] & 0xe0) | 0x12);
  *out++ = static_cast<uint8_t>((code[2] & 0x78) | 0x05);
  *out++ = static_cast<uint8_t>(0x08 | (code[2] & 0x04) << 3);
  *out++ = 0x50;
  *out++ = static_cast<uint8_t>(mode == 1 ? (code[4] & 0x3f) | 0x80 : code[4]);
  bool base_is_disp32 = false;
  if (mode != 3 && rm == 4) {
    base_is_disp32 = mode == 0 && (*in & 7) == 5;
    *out++ = *in++;
  }
  if (mode == 1) {
    store32(out, static_cast<int8_t>(*in));
    in += 1;
    out += 4;
  } else if (mode == 2 || base_is_disp32) {
    std::memcpy(out, in, 4);
    in += 4;
    out += 4;
  } else if (mode == 0 && rm == 5) {  // relative to the next instruction
    store32(out, load32(in) + distance(out, in));
    in += 4;
    out += 4;
  }
  write_jump(out, in);
  make_writable(code, kJumpBytes);
  write_jump(code, next_stub);
  next_stub = out + kJumpBytes;
  ++reencoded;
}

// The signal returns to the jump.
inline void on_sigill(int, siginfo_t*, void* raw) {
  reencode(reinterpret_cast<uint8_t*>(static_cast<ucontext_t*>(raw)->uc_mcontext.gregs[REG_RIP]));
}

inline void install() {
  make_writable(stubs, kStubBytes);
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) std::abort();
}

}  // namespace vpdpbusd
