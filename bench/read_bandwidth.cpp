// Measures how fast memory can be read: the figure that decode speed is compared with.
//
//     read_bandwidth THREADS MEGABYTES REPEATS     prints GB/s of each repeat, one a line
//
// Every thread sums its own part of one buffer, larger than any cache, 64 bytes at a time with
// independent accumulators and a prefetch: a plain sequential read, nothing else.

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

typedef uint64_t u64x8 __attribute__((vector_size(64)));  // the compiler splits it where it must

constexpr size_t kStep = 4;              // vectors an iteration, independent chains
constexpr size_t kPrefetchVectors = 64;  // 4 KB ahead, as the kernels do

#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif
uint64_t sum(const u64x8* data, size_t vectors) {
  u64x8 acc[kStep] = {};
  for (size_t i = 0; i < vectors; i += kStep) {
    for (size_t j = 0; j < kStep; ++j) {
      __builtin_prefetch(data + i + j + kPrefetchVectors);
      acc[j] += data[i + j];
    }
  }
  u64x8 total = acc[0] + acc[1] + acc[2] + acc[3];
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result += total[i];
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: read_bandwidth THREADS MEGABYTES REPEATS\n");
    return 2;
  }
  const size_t threads = std::strtoul(argv[1], nullptr, 10);
  const size_t bytes = std::strtoul(argv[2], nullptr, 10) << 20;
  const int repeats = std::atoi(argv[3]);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (threads == 0 || memory == MAP_FAILED) return 1;
  madvise(memory, bytes, MADV_HUGEPAGE);
  auto* words = static_cast<uint64_t*>(memory);
  for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) words[i] = i;  // real pages, not the shared zero page

  const auto* vectors = static_cast<const u64x8*>(memory);
  const size_t part = bytes / sizeof(u64x8) / threads / kStep * kStep;
  std::atomic<uint64_t> sink{0};
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::atomic<size_t> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> workers;
    for (size_t t = 1; t < threads; ++t) {
      workers.emplace_back([&, t] {
        ++ready;
        while (!go) std::this_thread::yield();
        sink += sum(vectors + t * part, part);
      });
    }
    while (ready + 1 < threads) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    go = true;
    sink += sum(vectors, part);
    for (std::thread& worker : workers) worker.join();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%.2f\n", static_cast<double>(threads * part * sizeof(u64x8)) / elapsed.count() / 1e9);
  }
  return sink == 0;  // the sum is used, so it is computed
}
