#include "int8/int8_check.h"

#include <string>

#include "common/error.h"

namespace biomedgpt {
namespace {

std::string shape_text(int64_t rows, int64_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

struct Bytes {
    uintptr_t begin;
    uintptr_t end;

    Bytes(const void* data, int64_t size)
        : begin(reinterpret_cast<uintptr_t>(data)), end(begin + static_cast<uintptr_t>(size)) {}
    bool overlap(const Bytes& other) const { return begin < other.end && other.begin < end; }
};

void check_floats(const char* name, const void* data) {
    if (data == nullptr) throw ArgumentError(name, "a null pointer", "data");
    if (reinterpret_cast<uintptr_t>(data) % alignof(float) != 0) {
        throw ArgumentError(name, "misaligned data", "an address that is a multiple of the size of float32");
    }
}

void check_apart(const char* name, const Bytes& y, const Bytes& other) {
    if (y.overlap(other)) throw ArgumentError(name, "memory that overlaps y", "memory apart from y");
}

}  // namespace

void check_int8_shape(const Int8Shape& shape) {
    const auto within = [](int64_t size, int64_t most) { return size >= 1 && size <= most; };
    if (!within(shape.rows, kMaxInt8Rows) || !within(shape.columns, kMaxInt8Columns)) {
        throw ArgumentError(
            "weights", "int8 " + shape_text(shape.rows, shape.columns),
            "1 to " + std::to_string(kMaxInt8Rows) + " rows and 1 to " + std::to_string(kMaxInt8Columns) + " columns");
    }
}

void check_int8_records(const uint8_t* records) {
    if (records == nullptr) throw ArgumentError("records", "a null pointer", "data");
    if (reinterpret_cast<uintptr_t>(records) % kInt8RecordAlignment != 0) {
        throw ArgumentError("records", "misaligned data",
                            "an address that is a multiple of " + std::to_string(kInt8RecordAlignment) + " bytes");
    }
}

void check_int8(const Int8Args& args) {
    const Int8Shape& shape = args.weights.shape;
    check_int8_shape(shape);
    if (args.rows < 0 || args.rows > kMaxInt8Rows) {
        throw ArgumentError("x", "float32 " + shape_text(args.rows, shape.columns),
                            "0 to " + std::to_string(kMaxInt8Rows) + " rows");
    }
    check_int8_records(args.weights.records);
    if (args.weights.bytes != shape.bytes()) {
        throw ArgumentError("records", std::to_string(args.weights.bytes) + " bytes",
                            std::to_string(shape.bytes()) + " for " + shape_text(shape.rows, shape.columns));
    }
    if (args.rows == 0) return;
    check_floats("x", args.x);
    check_floats("y", args.y);
    constexpr int64_t kSize = sizeof(float);
    const Bytes y(args.y, args.rows * shape.rows * kSize);
    check_apart("x", y, Bytes(args.x, args.rows * shape.columns * kSize));
    check_apart("records", y, Bytes(args.weights.records, shape.bytes()));
    if (args.residual == nullptr) return;
    check_floats("residual", args.residual);
    check_apart("residual", y, Bytes(args.residual, args.rows * shape.rows * kSize));
}

}  // namespace biomedgpt
