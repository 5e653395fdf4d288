// A static split of a range over threads that live as long as the call.
#pragma once

#include <cstdint>
#include <functional>

namespace biomedgpt {

// How many parts a job of `operations` elementary operations is worth, at most `threads` and at most `items`.
int worthwhile_parts(int threads, int64_t items, int64_t operations);

// Calls body(part, begin, end) once per part; the parts are disjoint, contiguous and cover [0, items). `body` must not
// throw, and what it computes for an item must not depend on the part: that makes results equal for any thread count.
void for_parts(int parts, int64_t items, const std::function<void(int part, int64_t begin, int64_t end)>& body);

}  // namespace biomedgpt
