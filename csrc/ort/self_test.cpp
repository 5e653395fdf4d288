#include "ort/self_test.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "int4/int4.h"
#include "int8/int8.h"

namespace biomedgpt {
namespace {

constexpr Int4Shape kShape{40, 96, 32};
constexpr int64_t kRows = 17;  // enough for values to be unpacked, and for a tile that is not full

// Integers that quantize to themselves: one of each group is 127.
int activation(int64_t row, int64_t column) {
    return column % kShape.group == 5 ? 127 : static_cast<int>((row * 31 + column * 17) % 255) - 127;
}

int weight(int64_t row, int64_t column) {
    return static_cast<int>((row * 7 + column * 3 + column / 16) % 16) - kInt4ZeroPoint;
}

static_assert(kInt8RecordAlignment == kInt4RecordAlignment);
struct alignas(kInt4RecordAlignment) Line {
    uint8_t bytes[kInt4RecordAlignment];
};

std::vector<Line> records() {
    constexpr uint16_t kOne = 0x3c00;
    std::vector<uint8_t> values;
    for (int64_t row = 0; row < kShape.rows; ++row) {
        for (int64_t column = 0; column < kShape.columns; column += 2) {
            const int low = weight(row, column) + kInt4ZeroPoint, high = weight(row, column + 1) + kInt4ZeroPoint;
            values.push_back(static_cast<uint8_t>(low | high << 4));
        }
    }
    const std::vector<uint16_t> scales(static_cast<size_t>(kShape.rows * kShape.groups()), kOne);
    std::vector<Line> lines(static_cast<size_t>(kShape.bytes() / kInt4RecordAlignment));
    int4_pack(kShape, {values.data(), scales.data()}, lines[0].bytes);
    return lines;
}

}  // namespace

void require_correct_int4() {
    const std::vector<Line> lines = records();
    std::vector<float> x, y(static_cast<size_t>(kRows * kShape.rows));
    for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t column = 0; column < kShape.columns; ++column) {
            x.push_back(static_cast<float>(activation(row, column)));
        }
    }
    for (const int64_t rows : {int64_t{1}, kRows}) {
        int4_linear({x.data(), y.data(), rows, {kShape, lines[0].bytes, kShape.bytes()}});
        for (int64_t i = 0; i < rows * kShape.rows; ++i) {
            int expected = 0;
            for (int64_t k = 0; k < kShape.columns; ++k) {
                expected += activation(i / kShape.rows, k) * weight(i % kShape.rows, k);
            }
            if (y[static_cast<size_t>(i)] != static_cast<float>(expected)) {
                throw std::runtime_error("the self-test of int4 path \"" + std::string(int4_paths().front()) +
                                         "\" gives a wrong product on this processor.");
            }
        }
    }
}

void require_correct_int8() {
    constexpr Int8Shape shape{40, 100};
    constexpr int64_t kCount = 21;  // more than a tile, and one that is not full
    const auto weight = [](int64_t row, int64_t column) {
        return static_cast<int>((row * 7 + column * 3) % 255) - 127;
    };
    const auto activation = [](int64_t row, int64_t column) {
        return column == 5 ? 127 : static_cast<int>((row * 31 + column * 17) % 255) - 127;
    };
    std::vector<int8_t> values;
    std::vector<float> x, y(static_cast<size_t>(kCount * shape.rows));
    for (int64_t i = 0; i < shape.rows * shape.columns; ++i) {
        values.push_back(static_cast<int8_t>(weight(i / shape.columns, i % shape.columns)));
    }
    for (int64_t i = 0; i < kCount * shape.columns; ++i) {
        x.push_back(static_cast<float>(activation(i / shape.columns, i % shape.columns)));
    }
    const std::vector<float> ones(static_cast<size_t>(shape.rows), 1.0f);
    std::vector<Line> lines(static_cast<size_t>(shape.bytes() / kInt8RecordAlignment));
    int8_pack(shape, {values.data(), ones.data(), ones.data()}, lines[0].bytes);
    Int8Args args;
    args.x = x.data();
    args.y = y.data();
    args.rows = kCount;
    args.weights = {shape, lines[0].bytes, shape.bytes()};
    int8_linear(args);
    for (int64_t i = 0; i < kCount * shape.rows; ++i) {
        int expected = 1;
        for (int64_t k = 0; k < shape.columns; ++k) {
            expected += activation(i / shape.rows, k) * weight(i % shape.rows, k);
        }
        if (y[static_cast<size_t>(i)] != static_cast<float>(expected)) {
            throw std::runtime_error("the self-test of int8 path \"" + std::string(int8_paths().front()) +
                                     "\" gives a wrong product on this processor.");
        }
    }
}

}  // namespace biomedgpt
