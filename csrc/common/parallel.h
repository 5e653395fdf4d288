// A job's items, given out one at a time to threads that wait between jobs without using a processor.
//
// A thread that has slept starts late, by a tenth of a millisecond on an idle machine and by several on a busy one. It
// finds fewer items left, or none, and nobody waits for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace biomedgpt {

// How many threads a job of `operations` elementary operations is worth, at most `threads` and at most `items`.
int worthwhile_threads(int threads, int64_t items, int64_t operations);

constexpr int kMaxThreads = 1024;

// The items of one job, in one or more lists, each of which is divided evenly among the threads. A thread takes its own
// share first: in the next call it will find in its processor's cache what it used in this one. Then it helps with the
// shares of the others.
class Items {
  public:
    explicit Items(int threads) : threads_(threads) {}

    int threads() const { return threads_; }
    int64_t next_of(int share) { return next_[share].fetch_add(1, std::memory_order_relaxed); }

  private:
    int threads_;
    std::atomic<int64_t> next_[kMaxThreads] = {};
};

// A thread's way through one share of a job: whoever goes it calls `take` for the same lists in the same order, and
// gets the items that are left when it comes by.
class Claims {
  public:
    Claims(Items& items, int share) : items_(items), share_(share), mine_(items.next_of(share)) {}

    // Calls work(i) for items i < count, in ascending order.
    template <class Work>
    void take(int64_t count, const Work& work) {
        const int64_t first = count * share_ / items_.threads(), end = count * (share_ + 1) / items_.threads();
        for (; mine_ < passed_ + end - first; mine_ = items_.next_of(share_)) work(first + mine_ - passed_);
        passed_ += end - first;
    }

  private:
    Items& items_;
    int share_;
    int64_t mine_;
    int64_t passed_ = 0;
};

// A reference to a callable, valid during the call it is passed to; unlike std::function it never allocates.
class ThreadBody {
  public:
    // A template that is not meant for copies of ThreadBody itself.
    template <typename Body, typename = std::enable_if_t<!std::is_same_v<std::decay_t<Body>, ThreadBody>>>
    ThreadBody(const Body& body)  // NOLINT: implicit, so that a lambda can be passed
        : object_(&body), call_([](const void* object, int thread) { (*static_cast<const Body*>(object))(thread); }) {}

    void operator()(int thread) const { call_(object_, thread); }

  private:
    const void* object_;
    void (*call_)(const void*, int);
};

// Calls body(0) in the calling thread and, while that call lasts, body(1) to body(threads - 1) in others; returns when
// all calls have. Any of the others may begin late or not at all, so whoever calls takes Items of all shares, until
// none is left. A body must not throw, and what it computes for an item must not depend on the thread: that makes
// results equal for any thread count. A call that finds the threads in use by another one works alone, so the processor
// is never asked for more threads than one call may use.
void for_threads(int threads, ThreadBody body);

}  // namespace biomedgpt
