#include "common/parallel.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace biomedgpt {

int worthwhile_parts(int threads, int64_t items, int64_t operations) {
    // Starting and joining a thread takes tens of microseconds; a core does about this many operations in 200 of them.
    constexpr int64_t kOperationsPerThread = int64_t{1} << 22;
    const int64_t parts = std::min({static_cast<int64_t>(threads), items, operations / kOperationsPerThread});
    return static_cast<int>(std::max<int64_t>(1, parts));
}

void for_parts(int parts, int64_t items, const std::function<void(int part, int64_t begin, int64_t end)>& body) {
    const auto run = [&](int part) { body(part, items * part / parts, items * (part + 1) / parts); };
    std::vector<std::thread> workers;
    workers.reserve(static_cast<size_t>(parts - 1));
    for (int part = 1; part < parts; ++part) {
        try {
            workers.emplace_back(run, part);
        } catch (const std::system_error&) {
            run(part);  // the system has no thread to give: slower, and the same result
        }
    }
    run(0);
    for (std::thread& worker : workers) {
        worker.join();
    }
}

}  // namespace biomedgpt
