#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <thread>
#include <vector>

#include "common/cuda_device.h"
#include "common/dtype.h"
#include "common/half.h"
#include "common/parallel.h"
#include "runner.h"

using namespace biomedgpt;

TEST(half_values) {
    CHECK(half_to_float(0x3c00) == 1.0f);
    CHECK(half_to_float(0xc000) == -2.0f);
    CHECK(half_to_float(0x7bff) == 65504.0f);
    CHECK(half_to_float(0x0001) == 0x1p-24f);
    CHECK(half_to_float(0x03ff) == 1023 * 0x1p-24f);
    CHECK(half_to_float(0x0400) == 0x1p-14f);
    CHECK(half_to_float(0x7c00) == std::numeric_limits<float>::infinity());
    CHECK(half_to_float(0xfc00) == -std::numeric_limits<float>::infinity());
    CHECK(std::isnan(half_to_float(0x7e00)));
    CHECK(half_to_float(0x8000) == 0.0f && std::signbit(half_to_float(0x8000)));
}

TEST(matrix_description) {
    CHECK(describe({nullptr, DType::f16, 3, 4, 4}) == "float16 [3, 4]");
    CHECK(describe({nullptr, DType::i8, 3, 4, 9}) == "int8 [3, 4] with row stride 9");
}

TEST(halves_survive_a_round_trip) {
    for (uint32_t half = 0; half < 0x10000; ++half) {
        const bool nan = (half & 0x7fffu) > 0x7c00u;
        const uint16_t back = float_to_half(half_to_float(static_cast<uint16_t>(half)));
        CHECK(nan ? (back & 0x7fffu) > 0x7c00u : back == half);
    }
}

TEST(floats_are_rounded_to_the_nearest_half_and_ties_to_even) {
    for (uint16_t half = 0; half < 0x7bff; ++half) {
        const float low = half_to_float(half), high = half_to_float(static_cast<uint16_t>(half + 1));
        const float middle = low + (high - low) / 2;
        const auto even = static_cast<uint16_t>(half + (half & 1));
        CHECK(float_to_half(middle) == even);
        CHECK(float_to_half(std::nextafter(middle, low)) == half);
        CHECK(float_to_half(-std::nextafter(middle, high)) == ((half + 1) | 0x8000));
    }
    CHECK(float_to_half(65519.996f) == 0x7bff);
    CHECK(float_to_half(65520.0f) == 0x7c00);
    CHECK(float_to_half(-1e30f) == 0xfc00);
}

// For a thread that may be slow to start, and not for ever.
static void wait_for_two(const std::atomic<int>& begun) {
    for (int tries = 0; begun < 2 && tries < 10'000; ++tries) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(each_item_is_taken_once) {
    for (int threads : {1, 2, 3, 7, 2, 5}) {
        std::vector<std::atomic<int>> first(100), second(4);
        Items items(threads);
        for_threads(threads, [&](int thread) {
            for (int i = 0; i < threads; ++i) {
                Claims claims(items, (thread + i) % threads);
                claims.take(100, [&](int64_t item) { ++first[static_cast<size_t>(item)]; });
                claims.take(0, [](int64_t) { CHECK(false); });
                claims.take(4, [&](int64_t item) { ++second[static_cast<size_t>(item)]; });
            }
        });
        for (const auto& visits : first) CHECK(visits == 1);
        for (const auto& visits : second) CHECK(visits == 1);
    }
}

TEST(a_thread_takes_its_own_share_first) {
    std::vector<int64_t> order;
    Items items(2);
    for (int share : {1, 0, 1}) Claims(items, share).take(5, [&](int64_t item) { order.push_back(item); });
    CHECK((order == std::vector<int64_t>{2, 3, 4, 0, 1}));
}

TEST(other_threads_help_and_are_waited_for) {
    std::atomic<int> begun{0}, ended{0};
    for_threads(2, [&](int) {
        ++begun;
        wait_for_two(begun);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        ++ended;
    });
    CHECK(ended == 2);
}

TEST(nobody_waits_for_threads_that_come_too_late) {
    for (int round = 0; round < 2000; ++round) {
        std::atomic<int> visits{0};
        for_threads(3, [&](int thread) { visits += thread == 0; });
        CHECK(visits == 1);
    }
}

TEST(several_threads_may_use_the_pool_at_once) {
    std::atomic<int> sum{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) {
                Items items(1);
                for_threads(
                    3, [&](int) { Claims(items, 0).take(5, [&](int64_t item) { sum += static_cast<int>(item); }); });
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(sum == 4 * 200 * (0 + 1 + 2 + 3 + 4));
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork into a child with threads
TEST(a_forked_child_has_threads_of_its_own) {
    if (std::getenv("EMULATED") != nullptr) {
        std::printf("skipped: a_forked_child_has_threads_of_its_own (qemu-user cannot fork a process with threads)\n");
        return;
    }
    for_threads(3, [](int) {});
    const pid_t child = fork();
    if (child == 0) {
        std::atomic<int> visits{0};
        for_threads(2, [&](int) {
            ++visits;
            wait_for_two(visits);
        });
        _exit(visits == 2 ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

TEST(small_work_stays_on_one_thread) {
    CHECK(worthwhile_threads(8, 100, 1000) == 1);
    CHECK(worthwhile_threads(8, 0, 0) == 1);
    CHECK(worthwhile_threads(8, 100, int64_t{1} << 40) == 8);
    CHECK(worthwhile_threads(8, 3, int64_t{1} << 40) == 3);
}

TEST(device_count_needs_no_driver) {
    CHECK(cuda_device_count() >= 0 && (cuda_compiled() || cuda_device_count() == 0));
}
