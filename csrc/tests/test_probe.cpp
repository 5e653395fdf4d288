#include <string>
#include <vector>

#include "common/error.h"
#include "probe/probe.h"
#include "runner.h"

using namespace biomedgpt;

// Each word has a bit pattern of its own, so that one that is left out or read twice shows.
static std::vector<uint64_t> distinct_words(int64_t count) {
    std::vector<uint64_t> words;
    for (int64_t i = 1; i <= count; ++i) words.push_back(static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull);
    return words;
}

TEST(every_pattern_reads_every_word_once) {
    for (const int64_t count : {0, 1, 7, 8, 9, 31, 32, 33, 100, 1000}) {
        const std::vector<uint64_t> words = distinct_words(count);
        uint64_t expected = 0;
        for (const uint64_t word : words) expected ^= word;
        for (const char* pattern : read_patterns()) CHECK(read_memory(words.data(), count, pattern) == expected);
    }
}

TEST(every_loop_does_the_operations_it_is_counted_with) {
    for (const ArithmeticLoop& loop : arithmetic_loops()) {
        for (const int64_t steps : {1, 3, 1000}) {
            CHECK(loop.run(steps) == static_cast<double>(steps * loop.operations_per_step) / 2);
        }
    }
}

TEST(every_kind_has_a_loop_for_any_processor) {
    for (const char* kind : {"int8", "fp32"}) CHECK(run_arithmetic("portable", kind, 2) > 0);
}

template <class Call>
static std::string refusal(const Call& call) {
    try {
        call();
    } catch (const ArgumentError& error) {
        return error.what();
    }
    return "";
}

TEST(unknown_names_are_refused) {
    CHECK(refusal([] { read_memory(nullptr, 0, "zigzag"); }).find("pattern: got 'zigzag'") == 0);
    CHECK(refusal([] { run_arithmetic("portable", "int3", 1); }).find("name: got 'portable' of int3") == 0);
    CHECK(refusal([] { run_arithmetic("portable", "int8", 0); }).find("steps: got 0") == 0);
}
