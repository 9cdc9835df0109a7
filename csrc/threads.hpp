// A small pool that the fused operations share: its threads sleep when there is nothing to do, so that they take no
// time from the engine's own threads between two calls.
#pragma once

#include <cstddef>
#include <functional>

namespace advrad {

// Calls work(task, slot) for every task in [0, tasks), on at most `threads` threads, the caller's among them, and returns when all
// are done.  `slot` in [0, threads) names the thread, for scratch memory.  The first exception is thrown again here.
void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t, std::size_t)>& work);

}  // namespace advrad
