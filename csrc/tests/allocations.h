// Counts what the whole test program allocates.
#pragma once

#include <cstdint>

namespace biomedgpt::testing {

// Calls of operator new so far, in all threads.
int64_t allocations();

}  // namespace biomedgpt::testing
