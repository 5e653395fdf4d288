#include <atomic>
#include <cmath>
#include <limits>
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

TEST(parts_cover_the_range_once) {
    for (int parts : {1, 2, 3, 7}) {
        std::vector<std::atomic<int>> visits(20);
        for_parts(parts, 20, [&](int, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        for (const auto& count : visits) CHECK(count == 1);
    }
}

TEST(small_work_stays_on_one_thread) {
    CHECK(worthwhile_parts(8, 100, 1000) == 1);
    CHECK(worthwhile_parts(8, 0, 0) == 1);
    CHECK(worthwhile_parts(8, 100, int64_t{1} << 40) == 8);
    CHECK(worthwhile_parts(8, 3, int64_t{1} << 40) == 3);
}

TEST(device_count_needs_no_driver) {
    CHECK(cuda_device_count() >= 0 && (cuda_compiled() || cuda_device_count() == 0));
}
