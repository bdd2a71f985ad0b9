// What a thread asks of the processor it runs on, in an instruction or two.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bitnet_ops {

// A breath between two looks at memory that another thread will write: 10 to 40 ns.
inline void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // what other spin locks use: longer than yield, which is no wait on most cores
#endif
}

// How the calling thread calculates: whether denormal numbers count as zeros (torch.set_flush_denormal), how results
// are rounded, which errors trap.
inline uint64_t float_control() {
#if defined(__x86_64__)
  constexpr uint32_t kFlags = 0x3f;  // of what has happened, the lowest bits of MXCSR
  return _mm_getcsr() & ~kFlags;
#elif defined(__aarch64__)
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  return control;
#else
  return 0;
#endif
}

// Has the calling thread calculate like the one whose float_control() this is. To write the register takes much longer
// than to read it, so it is written only where it differs.
inline void set_float_control(uint64_t control) {
  if (control == float_control()) return;
#if defined(__x86_64__)
  _mm_setcsr(static_cast<uint32_t>(control));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(control));
#endif
}

}  // namespace bitnet_ops
