#include <functional>
#include <new>
#include <string>
#include <thread>

#include "allocations.h"
#include "common/error.h"
#include "int8_example.h"
#include "runner.h"

using namespace biomedgpt;
using namespace biomedgpt::testing;

namespace {

// The message of the error that `change` provokes; also checks that nothing was written.
std::string message_after(const std::function<void(Int8Args&, Int8Options&)>& change) {
    std::mt19937 random(1);
    const Int8Example matrix({40, 70}, random);
    const std::vector<float> x = random_floats(2 * 70, random);
    std::vector<float> y(2 * 40, 7.0f);
    Int8Args args;
    args.x = x.data();
    args.y = y.data();
    args.rows = 2;
    args.weights = matrix.weights();
    Int8Options options;
    change(args, options);
    std::string message;
    try {
        int8_linear(args, options);
    } catch (const ArgumentError& error) {
        message = error.what();
    }
    for (float value : y) CHECK(value == 7.0f);
    return message;
}

bool starts_with(const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
}

float float_at(const uint8_t* bytes) {
    float value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

}  // namespace

TEST(int8_records_are_laid_out_as_documented) {
    std::mt19937 random(2);
    const Int8Example matrix({70, 130}, random);
    constexpr int64_t kValues = 32 * 192, kPanel = kValues + 256;
    CHECK(matrix.shape.bytes() == 3 * kPanel);
    for (int64_t row = 0; row < 96; ++row) {
        const uint8_t* panel = matrix.records() + row / 32 * kPanel;
        for (int64_t column = 0; column < 192; ++column) {
            const uint8_t byte = panel[column / 4 * 128 + row % 32 * 4 + column % 4];
            CHECK(static_cast<int8_t>(byte) == (row < 70 && column < 130 ? matrix.weight(row, column) : 0));
        }
        CHECK(float_at(panel + kValues + row % 32 * 4) == (row < 70 ? matrix.scales[size_t(row)] : 0));
        CHECK(float_at(panel + kValues + 128 + row % 32 * 4) == (row < 70 ? matrix.biases[size_t(row)] : 0));
    }
}

TEST(int8_records_unpack_to_the_bits_that_were_packed) {
    std::mt19937 random(3);
    for (int64_t rows : {1, 31, 32, 33, 100}) {
        for (int64_t columns : {1, 63, 64, 65, 258}) {
            const Int8Example matrix({rows, columns}, random);
            PoolThreads threads(2);
            Int8Example back(matrix.shape);
            int8_unpack(matrix.shape, matrix.records(), back.values.data(), back.scales.data(), back.biases.data(),
                        threads.parallel_for());
            CHECK(back.values == matrix.values && back.scales == matrix.scales && back.biases == matrix.biases);
        }
    }
}

TEST(int8_packs_no_value_of_minus_128) {
    Int8Example matrix({33, 65});
    matrix.lines.back().bytes[0] = 99;
    matrix.values.back() = -128;
    std::string message;
    try {
        matrix.pack();
    } catch (const ArgumentError& error) {
        message = error.what();
    }
    CHECK(message == "values: got -128, expected -127 to 127.");
    CHECK(matrix.lines.back().bytes[0] == 99);
}

TEST(int8_activations_are_quantized_by_the_book) {
    std::mt19937 random(4);
    constexpr int64_t kColumns = 150, kPadded = 192, kRows = 4;
    std::vector<float> x = random_floats(kRows * kColumns, random);
    for (int64_t i = 0; i < kColumns; ++i) x[size_t(i)] = 0;                                    // zeros
    for (int64_t i = kColumns; i < 2 * kColumns; ++i) x[size_t(i)] = float(i * 7 % 255) - 127;  // scale 1, no rounding
    x[kColumns] = 127;
    x[size_t(2 * kColumns + 3)] = 1e30f;  // an outlier
    for (const char* path : int8_paths()) {
        std::vector<int8_t> values(kRows * kPadded, 99);
        std::vector<float> scales(kRows);
        int8_quantize(x.data(), kRows, kColumns, {values.data(), scales.data()}, path);
        for (int64_t row = 0; row < kRows; ++row) {
            const Int8Reference expected(x.data() + row * kColumns, kColumns);
            CHECK(same({scales[size_t(row)]}, {expected.scale}));
            for (int64_t k = 0; k < kPadded; ++k) {
                CHECK(values[size_t(row * kPadded + k)] == (k < kColumns ? expected.values[size_t(k)] : 0));
            }
        }
    }
}

TEST(int8_refuses_what_it_cannot_compute) {
    const auto message = [](const std::function<void(Int8Args&)>& change) {
        return message_after([&](Int8Args& args, Int8Options&) { change(args); });
    };
    CHECK(starts_with(message([](Int8Args& args) { args.weights.shape.rows = 0; }), "weights: got int8 [0, 70]"));
    CHECK(starts_with(message([](Int8Args& args) { args.weights.shape.columns = kMaxInt8Columns + 1; }),
                      "weights: got int8 [40, 131073]"));
    CHECK(starts_with(message([](Int8Args& args) { args.weights.bytes -= 1; }), "records: got 8703 bytes, expected"));
    CHECK(starts_with(message([](Int8Args& args) { args.weights.shape.columns = 129; }), "records: got 8704 bytes"));
    CHECK(starts_with(message([](Int8Args& args) { args.weights.records += 32; }), "records: got misaligned"));
    CHECK(starts_with(message([](Int8Args& args) { args.weights.records = nullptr; }), "records: got a null"));
    CHECK(starts_with(message([](Int8Args& args) { args.rows = -1; }), "x: got float32 [-1, 70]"));
    CHECK(starts_with(message([](Int8Args& args) { args.x = nullptr; }), "x: got a null pointer"));
    CHECK(starts_with(message([](Int8Args& args) { args.y = nullptr; }), "y: got a null pointer"));
    CHECK(starts_with(message([](Int8Args& args) { args.x = args.y + 79; }), "x: got memory that overlaps y"));
    CHECK(starts_with(message([](Int8Args& args) { args.residual = args.y; }), "residual: got memory that overlaps y"));
    CHECK(starts_with(
        message([](Int8Args& args) { args.y = reinterpret_cast<float*>(const_cast<uint8_t*>(args.weights.records)); }),
        "records: got memory that overlaps y"));
    CHECK(starts_with(message_after([](Int8Args&, Int8Options& options) { options.path = "avx9"; }),
                      "path: got \"avx9\", expected \"auto\""));
}

TEST(int8_of_no_rows_writes_nothing) {
    std::mt19937 random(5);
    const Int8Example matrix({32, 32}, random);
    Int8Args args;
    args.weights = matrix.weights();
    int8_linear(args);
}

TEST(int8_calls_allocate_only_when_they_grow) {
    std::mt19937 random(6);
    const Int8Example matrix({100, 256}, random);
    const std::vector<float> x = random_floats(300 * 256, random);
    std::vector<float> y(300 * 100);
    Int8Args args;
    args.x = x.data();
    args.y = y.data();
    args.weights = matrix.weights();
    for (const char* path : int8_paths()) {
        args.rows = 300;
        int8_linear(args, {{}, path});
        const int64_t before = allocations();
        for (int64_t rows : {300, 1, 20}) {
            args.rows = rows;
            int8_linear(args, {{}, path});
        }
        CHECK(allocations() == before);
    }
}

// A pool's thread, where nobody would catch what is thrown.
TEST(int8_says_so_where_a_thread_has_no_memory) {
    std::mt19937 random(7);
    const Int8Example matrix({100, 256}, random);
    const std::vector<float> x = random_floats(4 * 256, random);
    const ParallelFor::Run in_a_new_thread = [](void*, size_t count, ParallelFor::Round round, void* state) {
        std::thread([=] {
            for (size_t i = 0; i < count; ++i) round(state, i);
        }).join();
    };
    const Int8Options options{{in_a_new_thread, nullptr}, "auto"};
    const std::vector<float> expected = int8_reference(x, 4, matrix);
    CHECK(same(int8_product(x, 4, matrix, options), expected));
    bool refused = false;
    refuse_allocations_from(size_t{256} << 10);
    try {
        int8_product(x, 4, matrix, options);
    } catch (const std::bad_alloc&) {
        refused = true;
    }
    refuse_allocations_from(SIZE_MAX);
    CHECK(refused);
    CHECK(same(int8_product(x, 4, matrix, options), expected));
}
