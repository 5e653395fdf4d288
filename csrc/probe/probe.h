// Yardsticks for benchmarks: how fast this machine reads memory, and how fast it multiplies and adds in registers. Each
// function is one thread's part and returns what proves that the work was done; whoever measures starts the threads.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace biomedgpt {

// Ways to read memory once from end to end; which is fastest depends on the processor's prefetchers.
const std::vector<const char*>& read_patterns();

// The exclusive or of `count` words, read by a pattern of `read_patterns()`. Throws ArgumentError for any other.
uint64_t read_memory(const uint64_t* words, int64_t count, std::string_view pattern);

// A loop that touches nothing but registers, so that no kernel of its kind is faster.
struct ArithmeticLoop {
    const char* name;             // the instruction set
    const char* kind;             // "int8": bytes into int32 sums; "fp32"
    int64_t operations_per_step;  // a multiplication and an addition are two
    // Starts at sums of zero and adds products of ones: returns steps * operations_per_step / 2, exactly as long as no
    // float sum passes 2^24 or int32 sum 2^31.
    double (*run)(int64_t steps);
};

// Those that this processor can run, the widest first within a kind; the last of each kind needs nothing.
const std::vector<ArithmeticLoop>& arithmetic_loops();

// Throws ArgumentError where no loop of `arithmetic_loops()` has that name and kind.
double run_arithmetic(std::string_view name, std::string_view kind, int64_t steps);

}  // namespace biomedgpt
