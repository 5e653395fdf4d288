#include "int4/int4_check.h"

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

}  // namespace

void check_int4_shape(const Int4Shape& shape) {
    if (shape.group != 128 && shape.group != 64 && shape.group != 32) {
        throw ArgumentError("group", std::to_string(shape.group), "128, 64 or 32");
    }
    const auto fits = [](int64_t size) { return size >= 1 && size <= kMaxInt4Size; };
    if (!fits(shape.rows) || !fits(shape.columns)) {
        throw ArgumentError("weights", "int4 " + shape_text(shape.rows, shape.columns),
                            "1 to " + std::to_string(kMaxInt4Size) + " rows and columns");
    }
}

void check_int4_records(const uint8_t* records) {
    if (records == nullptr) throw ArgumentError("records", "a null pointer", "data");
    if (reinterpret_cast<uintptr_t>(records) % kInt4RecordAlignment != 0) {
        throw ArgumentError("records", "misaligned data",
                            "an address that is a multiple of " + std::to_string(kInt4RecordAlignment) + " bytes");
    }
}

void check_int4(const Int4Args& args, int64_t matrices) {
    const Int4Shape& shape = args.weights.shape;
    check_int4_shape(shape);
    if (args.rows < 0 || args.rows > kMaxInt4Size) {
        throw ArgumentError("x", "float32 " + shape_text(args.rows, shape.columns),
                            "0 to " + std::to_string(kMaxInt4Size) + " rows");
    }
    check_int4_records(args.weights.records);
    const int64_t bytes = shape.bytes() * matrices;
    if (args.weights.bytes != bytes) {
        throw ArgumentError("records", std::to_string(args.weights.bytes) + " bytes",
                            std::to_string(bytes) + " for " + (matrices == 2 ? "two matrices " : "") +
                                shape_text(shape.rows, shape.columns) + " in groups of " + std::to_string(shape.group));
    }
    if (args.rows == 0) return;
    check_floats("x", args.x);
    check_floats("y", args.y);
    constexpr int64_t kSize = sizeof(float);
    const Bytes y(args.y, args.rows * shape.rows * kSize);
    if (y.overlap(Bytes(args.x, args.rows * shape.columns * kSize))) {
        throw ArgumentError("x", "memory that overlaps y", "memory apart from y");
    }
    if (y.overlap(Bytes(args.weights.records, bytes))) {
        throw ArgumentError("records", "memory that overlaps y", "memory apart from y");
    }
}

}  // namespace biomedgpt
