// Threads that share out the parts of one piece of work.
//
// Not torch's pool, because OpenMP waits at the end of a region for every worker, also for one that never got
// a processor: beside another process a decoded token then takes one time slice of the system for each of its
// regions, and idle workers burn the processor meanwhile. Here each thread has a share of the parts, whoever has a
// processor and no part left takes those of others, the caller waits only for parts that somebody has begun (and lends
// its processor to one who lost his), and a worker that finds nothing to do soon sleeps.
#pragma once

#include <cstdint>

namespace bitnet_ops {

constexpr int64_t kMostParts = 0xffff;

// Runs work(context, part) for every part of [0, parts), parts <= kMostParts, on at most `threads` threads: the
// caller and others, on CPUs that the caller may use, and no more than there are of these (but two where there is one).
// Each begins with a run of neighbouring parts, in order. While another caller's work is running, the caller does all
// of its own alone: so several Python threads do not wait for each other. Others treat denormal numbers and round as
// the caller does. What `work` throws is thrown here, once all parts have ended.
void run_parts(int64_t threads, int64_t parts, void (*work)(const void* context, int64_t part), const void* context);

}  // namespace bitnet_ops
