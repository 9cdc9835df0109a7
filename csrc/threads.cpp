#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace advrad {

namespace {

// Linux wakes a thread beside its waker unless the two share a cache with an idle processor, which in many virtual machines none
// does: it would wait for its waker's processor, for milliseconds.  So the workers are kept off the processor of whoever has work.
#if defined(__linux__)
class Elsewhere {
   public:
    void add() { workers_.push_back({static_cast<pid_t>(syscall(SYS_gettid)), -1}); }
    void keep_off_this() {
        const int here = sched_getcpu();
        if (here < 0 || here >= CPU_SETSIZE) return;
        for (Worker& worker : workers_) {
            if (worker.kept_off == here) continue;
            cpu_set_t others;
            if (sched_getaffinity(0, sizeof others, &others) != 0) return;
            CPU_CLR(here, &others);
            if (CPU_COUNT(&others) == 0 || sched_setaffinity(worker.id, sizeof others, &others) != 0) return;
            worker.kept_off = here;
        }
    }

   private:
    struct Worker {
        pid_t id;
        int kept_off;
    };
    std::vector<Worker> workers_;
};
#else
struct Elsewhere {
    void add() {}
    void keep_off_this() {}
};
#endif

// Waits for a tenth of a millisecond at most: a frame's operations come in quick succession, and to be woken takes longer than the
// pauses between them.
template <typename Ready>
void spin(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (!ready() && std::chrono::steady_clock::now() < end)
        for (int i = 0; i < 8 && !ready(); ++i) pause_briefly();
}

struct Job {
    Job(std::size_t tasks_, std::size_t threads, const std::function<void(std::size_t, std::size_t)>& work_)
        : tasks(tasks_), helpers(threads - 1), work(work_) {}

    void take_part(std::size_t slot) {
        for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            try {
                work(task, slot);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!error) error = std::current_exception();
                next.store(tasks, std::memory_order_relaxed);
            }
        }
    }

    const std::size_t tasks;
    std::size_t helpers;      // threads that may still join; guarded by the pool's mutex
    std::size_t joined = 0;   // the same
    const std::function<void(std::size_t, std::size_t)>& work;
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::condition_variable done;
    std::atomic<std::size_t> active{0};  // helpers at work; changed under `mutex`
    std::exception_ptr error;
};

class Pool {
   public:
    void run(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t, std::size_t)>& work) {
        Job job(tasks, threads, work);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            try {
                for (; workers_ < threads - 1; ++workers_) std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                // No more threads to be had: those there are do all the work.
            }
            jobs_.push_back(&job);
            waiting_.store(jobs_.size(), std::memory_order_relaxed);
            elsewhere_.keep_off_this();
        }
        if (threads > 2)
            wake_.notify_all();
        else
            wake_.notify_one();
        job.take_part(0);
        {
            // Nobody joins from here on.
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto place = std::find(jobs_.begin(), jobs_.end(), &job);
            if (place != jobs_.end()) jobs_.erase(place);
            waiting_.store(jobs_.size(), std::memory_order_relaxed);
        }
        spin([&] { return job.active.load(std::memory_order_acquire) == 0; });
        std::unique_lock<std::mutex> lock(job.mutex);
        job.done.wait(lock, [&] { return job.active.load(std::memory_order_relaxed) == 0; });
        if (job.error) std::rethrow_exception(job.error);
    }

   private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        elsewhere_.add();
        for (;;) {
            if (jobs_.empty()) {
                lock.unlock();
                spin([this] { return waiting_.load(std::memory_order_relaxed) > 0; });
                lock.lock();
            }
            wake_.wait(lock, [this] { return !jobs_.empty(); });
            Job* job = jobs_.front();
            const std::size_t slot = ++job->joined;
            if (job->joined == job->helpers) jobs_.pop_front();
            waiting_.store(jobs_.size(), std::memory_order_relaxed);
            {
                const std::lock_guard<std::mutex> guard(job->mutex);
                ++job->active;
            }
            lock.unlock();
            job->take_part(slot);
            {
                const std::lock_guard<std::mutex> guard(job->mutex);
                if (--job->active == 0) job->done.notify_one();  // inside the lock: the job lives on the caller's stack
            }
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job*> jobs_;
    std::atomic<std::size_t> waiting_{0};  // jobs, for a look without the mutex
    std::size_t workers_ = 0;
    Elsewhere elsewhere_;
};

// Never destroyed: its threads outlive main.  A forked child has none of them, and starts with a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    static const bool prepared = [] {
        current.store(new Pool);
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { current.store(new Pool); });
#endif
        return true;
    }();
    (void)prepared;
    return *current.load();
}

}  // namespace

void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t, std::size_t)>& work) {
    threads = std::min(threads, tasks);
    if (threads > 1) {
        pool().run(tasks, threads, work);
        return;
    }
    for (std::size_t task = 0; task < tasks; ++task) work(task, 0);
}

}  // namespace advrad
