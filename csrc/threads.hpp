// A small pool that the fused operations and the engine share: its threads sleep soon after there is nothing left to do.
#pragma once

#include <cstddef>
#include <functional>

namespace advrad {

// Calls work(task, slot) for every task in [0, tasks), on at most `threads` threads, the caller's among them, and returns when all
// are done.  `slot` in [0, threads) names the thread, for scratch memory.  The first exception is thrown again here.
void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t, std::size_t)>& work);

// In a loop that waits for another thread.
inline void pause_briefly() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_ia32_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    __asm__ volatile("yield");
#endif
}

}  // namespace advrad
