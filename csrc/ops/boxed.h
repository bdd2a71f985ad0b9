// How errors leave an operator. PyTorch and this extension need not have the same C++ library: that of Windows' PyTorch
// is Microsoft's, and wheels may bring one of their own. An exception of one is none of the other, which would end the
// process. So all are caught here, and PyTorch throws its own with their text.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>

#include "ops/tensors.h"

namespace bitnet_ops {

// Of an error, where no destructor has to free it: the way out of here runs none where it is another library's.
inline constexpr size_t kMostErrorBytes = 4096;

// The text of what `boxed` throws, null if it throws nothing. Not inlined, so that its caller is a function that no
// exception has any business in.
template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
__attribute__((noinline)) const char* error_of(StableIValue* stack, uint64_t arguments, uint64_t outputs) noexcept {
  static thread_local char message[kMostErrorBytes];
  try {
    boxed(stack, arguments, outputs);
    return nullptr;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
  } catch (...) {
    std::snprintf(message, sizeof message, "bitnet_ops: an exception of unknown type");
  }
  return message;
}

// As TORCH_BOX(function), whose value is `boxed`. PyTorch's exception passes through here: it must neither be caught
// nor find a destructor, because either would call this side's library.
template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void run_boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  const char* error = error_of<boxed>(stack, arguments, outputs);
  if (error != nullptr) aoti_torch_check(false, "bitnet_ops", __FILE__, __LINE__, error);
}

}  // namespace bitnet_ops

#define BITNET_BOX(function) (&bitnet_ops::run_boxed<&TORCH_BOX(function)>)
