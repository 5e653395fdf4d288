// Counts what the whole test program allocates, and lets it fail.
#pragma once

#include <cstddef>
#include <cstdint>

namespace biomedgpt::testing {

// Calls of operator new so far, in all threads.
int64_t allocations();

// Has operator new fail for so many bytes or more, in all threads, until called again: SIZE_MAX allows all.
void refuse_allocations_from(size_t bytes);

}  // namespace biomedgpt::testing
