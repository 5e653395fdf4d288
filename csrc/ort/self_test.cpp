#include "ort/self_test.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "int4/int4.h"
#include "int8/int8.h"

namespace biomedgpt {
namespace {

// With a panel that is not full, and with whole ones and groups of two tiles.
constexpr Int4Shape kShapes[] = {{40, 96, 32}, {64, 256, 128}};
// One; a few; enough for values to be unpacked, and for a tile that is not full; and enough for all that many rows
// meet.
constexpr int64_t kRowCounts[] = {1, 5, 17, 64};
constexpr int64_t kMostRows = 64;

// Integers that quantize to themselves: one of each group that shares a scale is 127.
int activation(int64_t row, int64_t column, int64_t group) {
    return column % group == 5 ? 127 : static_cast<int>((row * 31 + column * 17) % 255) - 127;
}

int weight(int64_t row, int64_t column) {
    return static_cast<int>((row * 7 + column * 3 + column / 16) % 16) - kInt4ZeroPoint;
}

static_assert(kInt8RecordAlignment == kInt4RecordAlignment);
struct alignas(kInt4RecordAlignment) Line {
    uint8_t bytes[kInt4RecordAlignment];
};

std::vector<Line> records(const Int4Shape& shape) {
    constexpr uint16_t kOne = 0x3c00;
    std::vector<uint8_t> values;
    for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t column = 0; column < shape.columns; column += 2) {
            const int low = weight(row, column) + kInt4ZeroPoint, high = weight(row, column + 1) + kInt4ZeroPoint;
            values.push_back(static_cast<uint8_t>(low | high << 4));
        }
    }
    const std::vector<uint16_t> scales(static_cast<size_t>(shape.rows * shape.groups()), kOne);
    std::vector<Line> lines(static_cast<size_t>(shape.bytes() / kInt4RecordAlignment));
    int4_pack(shape, {values.data(), scales.data()}, lines[0].bytes);
    return lines;
}

}  // namespace

void require_correct_int4() {
    for (const Int4Shape& shape : kShapes) {
        const std::vector<Line> lines = records(shape);
        std::vector<float> x;
        for (int64_t i = 0; i < kMostRows * shape.columns; ++i) {
            x.push_back(static_cast<float>(activation(i / shape.columns, i % shape.columns, shape.group)));
        }
        // On a cache line, as ONNX Runtime has it: some paths write it otherwise elsewhere.
        std::vector<Line> memory(static_cast<size_t>(kMostRows * shape.rows) * sizeof(float) / sizeof(Line));
        auto* y = reinterpret_cast<float*>(memory[0].bytes);
        for (const int64_t rows : kRowCounts) {
            int4_linear({x.data(), y, rows, {shape, lines[0].bytes, shape.bytes()}});
            // Of many, some in every row and column are enough.
            const int64_t step = rows > 1 ? 13 : 1;
            for (int64_t i = 0; i < rows * shape.rows; i += step) {
                int expected = 0;
                for (int64_t k = 0; k < shape.columns; ++k) {
                    expected += activation(i / shape.rows, k, shape.group) * weight(i % shape.rows, k);
                }
                if (y[i] != static_cast<float>(expected)) {
                    throw std::runtime_error("the self-test of int4 path \"" + std::string(int4_paths().front()) +
                                             "\" gives a wrong product on this processor.");
                }
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
    std::vector<int8_t> values;
    std::vector<float> x, y(static_cast<size_t>(kCount * shape.rows));
    for (int64_t i = 0; i < shape.rows * shape.columns; ++i) {
        values.push_back(static_cast<int8_t>(weight(i / shape.columns, i % shape.columns)));
    }
    for (int64_t i = 0; i < kCount * shape.columns; ++i) {
        x.push_back(static_cast<float>(activation(i / shape.columns, i % shape.columns, shape.columns)));
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
            expected += activation(i / shape.rows, k, shape.columns) * weight(i % shape.rows, k);
        }
        if (y[static_cast<size_t>(i)] != static_cast<float>(expected)) {
            throw std::runtime_error("the self-test of int8 path \"" + std::string(int8_paths().front()) +
                                     "\" gives a wrong product on this processor.");
        }
    }
}

namespace {

constexpr int64_t kHeads = 2, kHeadSize = 32, kWidth = (kHeads + 2) * kHeadSize;
// Beyond the first tile of positions; the last one is a step of its own.
constexpr int64_t kPositions = 140;

// The element in which a query is large: it attends to the positions whose keys are 1 there, which are those of the
// same remainder, and to all of them alike.
int64_t wanted(int64_t position, int64_t head) {
    return (position / 3 + head) % (position + 1) % kHeadSize;
}

// What is left of the others, a hundred times 127 / e^87 at most, where it is not lost beside larger numbers.
constexpr float kLeft = 1e-33f;

std::vector<float> queries_keys_values() {
    std::vector<float> qkv(static_cast<size_t>(kPositions * kWidth));
    for (int64_t position = 0; position < kPositions; ++position) {
        float* row = qkv.data() + position * kWidth;
        for (int64_t head = 0; head < kHeads; ++head) row[head * kHeadSize + wanted(position, head)] = 1000.0f;
        row[kHeads * kHeadSize + position % kHeadSize] = 1.0f;
        for (int64_t i = 0; i < kHeadSize; ++i) {
            row[(kHeads + 1) * kHeadSize + i] = static_cast<float>(activation(position, i, kHeadSize));
        }
    }
    return qkv;
}

float expected(int64_t position, int64_t head, int64_t element) {
    int sum = 0, count = 0;
    for (int64_t i = wanted(position, head); i <= position; i += kHeadSize, ++count) {
        sum += activation(i, element, kHeadSize);
    }
    return static_cast<float>(sum) / static_cast<float>(count);
}

void require_correct_attention(KvFormat format) {
    const KvShape shape{1, kHeadSize, (kPositions + kKvBlock - 1) / kKvBlock, format};
    std::vector<float> keys(static_cast<size_t>(shape.blocks * shape.block_bytes()) / sizeof(float)), values = keys;
    const std::vector<float> qkv = queries_keys_values(), ones(kPositions * kHeadSize / 2, 1.0f), zeros(ones.size());
    std::vector<float> y(kPositions * kHeads * kHeadSize);
    AttentionArgs args;
    args.heads = kHeads;
    args.cache = {shape, reinterpret_cast<uint8_t*>(keys.data()), reinterpret_cast<uint8_t*>(values.data())};
    args.rope = {ones.data(), zeros.data(), kPositions};
    for (const int64_t end : {kPositions - 1, kPositions}) {
        args.qkv = qkv.data() + args.first * kWidth;
        args.y = y.data() + args.first * kHeads * kHeadSize;
        args.rows = end - args.first;
        causal_attention(args);
        args.first = end;
    }
    for (int64_t i = 0; i < kPositions * kHeads * kHeadSize; ++i) {
        const int64_t row = i / kHeadSize;
        const float off = y[static_cast<size_t>(i)] - expected(row / kHeads, row % kHeads, i % kHeadSize);
        if (!(off <= kLeft && off >= -kLeft)) {
            throw std::runtime_error("the self-test of attention path \"" + std::string(attention_paths().front()) +
                                     "\" gives a wrong sum on this processor.");
        }
    }
}

}  // namespace

void require_correct_attention() {
    for (const KvFormat format : {KvFormat::f32, KvFormat::f16, KvFormat::i8}) require_correct_attention(format);
}

}  // namespace biomedgpt
