#include "common/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace biomedgpt {
namespace {

// No signal is delivered to a thread made meanwhile: the process's handlers expect its own threads, and a Ctrl-C that
// lands here would not interrupt what Python waits for.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t before_;
};

// The processors that the calling thread may use, and among them the one it runs on. A thread that is woken tends to be
// put on the processor of the one that wakes it, and stays there until the scheduler notices, which takes milliseconds
// (measured: 0.3 to 4, against 0.07 for a thread that may not go there).
class Processors {
  public:
    Processors() {
        CPU_ZERO(&allowed_);
        const int current = sched_getcpu();
        known_ = current >= 0 && sched_getaffinity(0, sizeof allowed_, &allowed_) == 0;
        others_ = allowed_;
        if (known_) CPU_CLR(static_cast<size_t>(current), &others_);
    }

    // Not knowing, or having one processor alone, is no reason to fail: the scheduler decides then.
    void leave_to_caller(pthread_t thread) const {
        if (known_ && CPU_COUNT(&others_) > 0) pthread_setaffinity_np(thread, sizeof others_, &others_);
    }
    void share(pthread_t thread) const {
        if (known_) pthread_setaffinity_np(thread, sizeof allowed_, &allowed_);
    }

  private:
    cpu_set_t allowed_, others_;
    bool known_;
};

// Threads that sleep on a condition variable between jobs. They do not spin: ONNX Runtime's own threads need the
// processors as soon as a job is done.
class Pool {
  public:
    // False if the pool is at work for another thread.
    bool run(int helpers, ThreadBody body) {
        const std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine.owns_lock()) return false;
        const int helped = grow(helpers);
        const Processors processors;
        for (int i = 0; i < helped; ++i) processors.leave_to_caller(handles_[static_cast<size_t>(i)]);
        {
            const std::lock_guard<std::mutex> lock(state_);
            body_ = &body;
            wanted_ = helped;
            ++job_;
        }
        start_.notify_all();
        body(0);
        for (int i = 0; i < helped; ++i) processors.share(handles_[static_cast<size_t>(i)]);
        std::unique_lock<std::mutex> lock(state_);
        body_ = nullptr;  // whoever wakes now finds nothing to do
        done_.wait(lock, [&] { return at_work_ == 0; });
        return true;
    }

  private:
    // Starts threads until there are `wanted`, or as many as the system gives; returns how many of them will help.
    int grow(int wanted) {
        while (static_cast<int>(handles_.size()) < wanted) {
            try {
                handles_.reserve(handles_.size() + 1);
                const SignalsBlocked blocked;
                std::thread thread(&Pool::work, this, static_cast<int>(handles_.size()) + 1, job_);
                handles_.push_back(thread.native_handle());
                thread.detach();
            } catch (const std::system_error&) {
                break;
            }
        }
        return std::min(static_cast<int>(handles_.size()), wanted);
    }

    void work(int number, uint64_t last) {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            start_.wait(lock, [&] { return job_ != last; });
            last = job_;
            if (number > wanted_ || body_ == nullptr) continue;
            const ThreadBody body = *body_;
            ++at_work_;
            lock.unlock();
            body(number);
            lock.lock();
            if (--at_work_ == 0) done_.notify_one();
        }
    }

    std::mutex in_use_;  // held by the thread whose job this is; guards handles_ too
    std::vector<pthread_t> handles_;

    std::mutex state_;  // guards all below
    std::condition_variable start_, done_;
    const ThreadBody* body_ = nullptr;
    int wanted_ = 0;
    int at_work_ = 0;
    uint64_t job_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* current = pool.load(std::memory_order_acquire);
    if (current == nullptr) {
        // A forked child has the pool's memory but none of its threads: it gets a pool of its own.
        static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
        static_cast<void>(registered);
        auto* fresh = new Pool;
        if (pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

}  // namespace

int worthwhile_threads(int threads, int64_t items, int64_t operations) {
    // Waking a thread takes tens of microseconds; a core does about this many operations in 100 of them.
    constexpr int64_t kOperationsPerThread = int64_t{1} << 22;
    const int64_t worthwhile = std::min({static_cast<int64_t>(threads), items, operations / kOperationsPerThread});
    return static_cast<int>(std::max<int64_t>(1, worthwhile));
}

void for_threads(int threads, ThreadBody body) {
    if (threads <= 1 || !the_pool().run(threads - 1, body)) body(0);
}

}  // namespace biomedgpt
