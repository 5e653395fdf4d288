// A loop whose rounds may run at once, in threads that belong to whoever calls an op: ONNX Runtime's pool or our own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biomedgpt {

class ParallelFor {
  public:
    using Round = void (*)(void* state, size_t index);
    // Calls round(state, i) once for every i < count, in any order and in any threads; returns when all calls have.
    using Run = void (*)(void* pool, size_t count, Round round, void* state);

    // In the calling thread, one round after another.
    ParallelFor() = default;
    ParallelFor(Run run, void* pool) : run_(run), pool_(pool) {}

    // `body(i)` must not throw, since nobody may be there to catch it.
    template <typename Body>
    void operator()(int64_t count, const Body& body) const {
        const auto rounds = static_cast<size_t>(count);
        const Round round = [](void* state, size_t index) {
            (*static_cast<const Body*>(state))(static_cast<int64_t>(index));
        };
        void* state = const_cast<Body*>(&body);
        if (run_ != nullptr && rounds > 1) return run_(pool_, rounds, round, state);
        for (size_t i = 0; i < rounds; ++i) round(state, i);
    }

  private:
    Run run_ = nullptr;
    void* pool_ = nullptr;
};

// On at most `threads` threads of this library's own pool, 1 to kMaxThreads (see parallel.h).
class PoolThreads {
  public:
    explicit PoolThreads(int threads) : threads_(threads) {}
    ParallelFor parallel_for() { return {run, this}; }

  private:
    static void run(void* pool, size_t count, ParallelFor::Round round, void* state);

    int threads_;
};

}  // namespace biomedgpt
