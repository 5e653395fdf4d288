#include <functional>
#include <string>

#include "allocations.h"
#include "common/error.h"
#include "int4_example.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

// The message of the error that `change` provokes; also checks that nothing was written.
std::string message_after(const std::function<void(Int4Args&, Int4Options&)>& change) {
    std::mt19937 random(1);
    const Int4Matrix matrix({40, 64, 32}, random);
    const std::vector<float> x = random_floats(2 * 64, random);
    std::vector<float> y(2 * 40, 7.0f);
    Int4Args args{x.data(), y.data(), 2, matrix.weights()};
    Int4Options options;
    change(args, options);
    std::string message;
    try {
        int4_linear(args, options);
    } catch (const ArgumentError& error) {
        message = error.what();
    }
    for (float value : y) CHECK(value == 7.0f);
    return message;
}

bool starts_with(const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
}

}  // namespace

TEST(int4_records_are_laid_out_as_documented) {
    for (int64_t group : {128, 64, 32}) {
        std::mt19937 random(2);
        const Int4Matrix matrix({70, 2 * group, group}, random);
        const int64_t record_bytes = 16 * group + 64;
        CHECK(matrix.shape.bytes() == 3 * 2 * record_bytes);
        for (int64_t row = 0; row < 70; ++row) {
            for (int64_t column = 0; column < 2 * group; ++column) {
                const uint8_t* record = matrix.records() + (row / 32 * 2 + column / group) * record_bytes;
                const int64_t in_group = column % group, in_block = in_group % 8;
                const uint8_t byte = record[in_group / 8 * 128 + row % 32 * 4 + in_block % 4];
                CHECK((in_block < 4 ? byte & 15 : byte >> 4) - 8 == matrix.weight(row, column));
                uint16_t scale;
                std::memcpy(&scale, record + 16 * group + row % 32 * 2, 2);
                CHECK(half_to_float(scale) == matrix.scale(row, column / group));
            }
        }
        const uint8_t* last = matrix.records() + 2 * 2 * record_bytes;
        CHECK(last[6 * 4] == 0x88 && last[16 * group + 6 * 2] == 0 && last[16 * group + 6 * 2 + 1] == 0);
    }
}

TEST(int4_records_unpack_to_the_bits_that_were_packed) {
    std::mt19937 random(3);
    for (int64_t rows : {1, 31, 32, 33, 100}) {
        for (int64_t group : {128, 64, 32}) {
            Int4Matrix matrix({rows, 3 * group - 5, group}, random);
            for (uint16_t& scale : matrix.scales) scale = static_cast<uint16_t>(random());  // infinities and NaNs, too
            PoolThreads threads(2);
            int4_pack(matrix.shape, {matrix.values.data(), matrix.scales.data()}, matrix.records(),
                      threads.parallel_for());
            Int4Matrix back(matrix.shape);
            int4_unpack(matrix.shape, matrix.records(), back.values.data(), back.scales.data(), threads.parallel_for());
            CHECK(back.values == matrix.values && back.scales == matrix.scales);
        }
    }
}

TEST(int4_activations_are_quantized_by_the_book) {
    std::mt19937 random(4);
    for (int64_t group : {128, 64, 32}) {
        const Int4Shape shape{1, 5 * group - 9, group};
        std::vector<float> x = random_floats(shape.columns, random);
        for (int64_t i = 0; i < group; ++i) x[size_t(i)] = 0;                             // zeros
        for (int64_t i = group; i < 2 * group; ++i) x[size_t(i)] = float(i % 255) - 127;  // scale 1, no rounding
        x[size_t(2 * group + 3)] = 1e30f;                                                 // an outlier
        const Int4Reference expected(x.data(), shape);
        for (const char* path : int4_paths()) {
            std::vector<int8_t> values(static_cast<size_t>(5 * group), 99);
            std::vector<float> scales(5);
            std::vector<int32_t> zero_terms(5);
            int4_quantize(x.data(), 1, shape, {values.data(), scales.data(), zero_terms.data()}, path);
            CHECK(same(scales, expected.scales));
            for (int64_t g = 0; g < 5; ++g) {
                int sum = 0;
                for (int64_t k = g * group; k < (g + 1) * group; ++k) {
                    CHECK(values[size_t(k)] == expected.values[size_t(k)]);
                    sum += values[size_t(k)];
                }
                CHECK(zero_terms[size_t(g)] == -8 * sum);
            }
        }
    }
}

TEST(int4_refuses_what_it_cannot_compute) {
    const auto message = [](const std::function<void(Int4Args&)>& change) {
        return message_after([&](Int4Args& args, Int4Options&) { change(args); });
    };
    CHECK(starts_with(message([](Int4Args& args) { args.weights.shape.group = 16; }), "group: got 16, expected 128"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.shape.rows = 0; }), "weights: got int4 [0, 64]"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.shape.columns = int64_t{1} << 40; }), "weights: got"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.bytes -= 1; }), "records: got 2303 bytes, expected"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.shape.columns = 65; }), "records: got 2304 bytes"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.records += 32; }), "records: got misaligned"));
    CHECK(starts_with(message([](Int4Args& args) { args.weights.records = nullptr; }), "records: got a null"));
    CHECK(starts_with(message([](Int4Args& args) { args.rows = -1; }), "x: got float32 [-1, 64]"));
    CHECK(starts_with(message([](Int4Args& args) { args.x = nullptr; }), "x: got a null pointer"));
    CHECK(starts_with(message([](Int4Args& args) { args.y = nullptr; }), "y: got a null pointer"));
    CHECK(starts_with(message([](Int4Args& args) { args.x = args.y + 79; }), "x: got memory that overlaps y"));
    CHECK(starts_with(
        message([](Int4Args& args) { args.y = reinterpret_cast<float*>(const_cast<uint8_t*>(args.weights.records)); }),
        "records: got memory that overlaps y"));
    CHECK(starts_with(message_after([](Int4Args&, Int4Options& options) { options.path = "avx9"; }),
                      "path: got \"avx9\", expected \"auto\""));
}

TEST(int4_writes_many_rows_wherever_y_begins_and_nothing_beside_it) {
    std::mt19937 random(7);
    constexpr int64_t kMargin = 64;
    for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{32, 32}, {49, 96}, {64, 128}, {64, 100}, {300, 64}}) {
        const Int4Matrix matrix({width, 256, 128}, random);
        const std::vector<float> x = random_floats(rows * 256, random);
        const std::vector<float> expected = int4_reference(x, rows, matrix);
        const int64_t count = rows * width;
        for (const char* path : int4_paths()) {
            for (const int64_t offset : {0, 1, 8}) {
                std::vector<Line> memory(static_cast<size_t>(count + 2 * kMargin) * sizeof(float) / sizeof(Line) + 1);
                auto* all = reinterpret_cast<float*>(memory[0].bytes);
                std::fill_n(all, count + 2 * kMargin, 7.0f);
                float* y = all + kMargin + offset;
                PoolThreads threads(2);
                int4_linear({x.data(), y, rows, matrix.weights()}, {threads.parallel_for(), path});
                CHECK(same({y, y + count}, expected));
                CHECK(std::all_of(all, y, [](float value) { return value == 7.0f; }));
                CHECK(std::all_of(y + count, all + count + 2 * kMargin, [](float value) { return value == 7.0f; }));
            }
        }
    }
}

TEST(int4_of_no_rows_writes_nothing) {
    std::mt19937 random(5);
    const Int4Matrix matrix({32, 32, 32}, random);
    int4_linear({nullptr, nullptr, 0, matrix.weights()});
}

TEST(int4_calls_allocate_only_when_they_grow) {
    std::mt19937 random(6);
    const Int4Matrix matrix({100, 256, 128}, random);
    const std::vector<float> x = random_floats(300 * 256, random);
    std::vector<float> y(300 * 100);
    PoolThreads threads(2);
    for (const char* path : int4_paths()) {
        const Int4Options options{threads.parallel_for(), path};
        int4_linear({x.data(), y.data(), 300, matrix.weights()}, options);
        const int64_t before = allocations();
        for (int64_t rows : {300, 1, 20}) int4_linear({x.data(), y.data(), rows, matrix.weights()}, options);
        CHECK(allocations() == before);
    }
}
