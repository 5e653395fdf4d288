#include "common/parallel_for.h"

#include "common/parallel.h"

namespace biomedgpt {

void PoolThreads::run(void* pool, size_t count, ParallelFor::Round round, void* state) {
    const int threads = static_cast<PoolThreads*>(pool)->threads_;
    Items items(threads);
    for_threads(threads, [&](int thread) {
        for (int i = 0; i < threads; ++i) {
            Claims claims(items, (thread + i) % threads);
            claims.take(static_cast<int64_t>(count), [&](int64_t item) { round(state, static_cast<size_t>(item)); });
        }
    });
}

}  // namespace biomedgpt
