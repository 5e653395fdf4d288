// Matrices of four-bit weights as MatMulNBits' blocks and as records, and what int4 must make of them, bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "common/half.h"
#include "int4/int4.h"

namespace biomedgpt::testing {

struct alignas(64) Line {
    uint8_t bytes[64];
};

struct Int4Matrix {
    Int4Shape shape;
    std::vector<uint8_t> values;
    std::vector<uint16_t> scales;
    std::vector<Line> lines;

    explicit Int4Matrix(const Int4Shape& of)
        : shape(of),
          values(static_cast<size_t>(of.rows * of.groups() * of.group / 2)),
          scales(static_cast<size_t>(of.rows * of.groups())),
          lines(static_cast<size_t>(of.bytes() / 64)) {}

    Int4Matrix(const Int4Shape& of, std::mt19937& random) : Int4Matrix(of) {
        std::uniform_real_distribution<float> uniform(-0.1f, 0.1f);
        for (uint8_t& byte : values) byte = static_cast<uint8_t>(random());
        for (uint16_t& scale : scales) scale = float_to_half(uniform(random));
        pack();
    }

    uint8_t* records() { return lines[0].bytes; }
    const uint8_t* records() const { return lines[0].bytes; }
    void pack() { int4_pack(shape, {values.data(), scales.data()}, records()); }

    // The integer that a weight stands for.
    int weight(int64_t row, int64_t column) const {
        const int64_t index = row * shape.groups() * shape.group + column;
        return (values[static_cast<size_t>(index / 2)] >> (index % 2 * 4) & 15) - kInt4ZeroPoint;
    }
    float scale(int64_t row, int64_t group) const {
        return half_to_float(scales[static_cast<size_t>(row * shape.groups() + group)]);
    }
    Int4Weights weights() const { return {shape, records(), shape.bytes()}; }
};

// One row of activations, quantized by the book.
struct Int4Reference {
    std::vector<int> values;
    std::vector<float> scales;

    Int4Reference(const float* x, const Int4Shape& shape) {
        for (int64_t group = 0; group < shape.groups(); ++group) {
            const auto at = [&](int64_t i) {
                const int64_t column = group * shape.group + i;
                return column < shape.columns ? x[column] : 0.0f;
            };
            float largest = 0;
            bool finite = true;
            for (int64_t i = 0; i < shape.group; ++i) {
                finite = finite && std::isfinite(at(i));
                largest = std::fmax(largest, std::fabs(at(i)));
            }
            const bool zero = !finite || largest < 0x1p-119f;
            scales.push_back(!finite ? NAN : zero ? 0.0f : largest / 127.0f);
            for (int64_t i = 0; i < shape.group; ++i) {
                values.push_back(zero ? 0 : static_cast<int>(std::nearbyint(at(i) * (127.0f / largest))));
            }
        }
    }

    float times(const Int4Matrix& matrix, int64_t row) const {
        float total = 0;
        for (int64_t group = 0; group < matrix.shape.groups(); ++group) {
            int sum = 0;
            for (int64_t k = group * matrix.shape.group; k < (group + 1) * matrix.shape.group; ++k) {
                sum += values[static_cast<size_t>(k)] * matrix.weight(row, k);
            }
            const float product = static_cast<float>(sum) * matrix.scale(row, group);
            total = std::fma(product, scales[static_cast<size_t>(group)], total);
        }
        return total;
    }
};

// All rows of a call by that reference.
inline std::vector<float> int4_reference(const std::vector<float>& x, int64_t rows, const Int4Matrix& matrix) {
    std::vector<float> y;
    for (int64_t m = 0; m < rows; ++m) {
        const Int4Reference row(x.data() + m * matrix.shape.columns, matrix.shape);
        for (int64_t n = 0; n < matrix.shape.rows; ++n) y.push_back(row.times(matrix, n));
    }
    return y;
}

inline std::vector<float> int4_product(const std::vector<float>& x, int64_t rows, const Int4Matrix& matrix,
                                       const Int4Options& options) {
    // On a cache line, as ONNX Runtime has it: many rows are written otherwise there.
    const auto count = static_cast<size_t>(rows * matrix.shape.rows);
    std::vector<Line> memory(count * sizeof(float) / sizeof(Line) + 1);
    auto* y = reinterpret_cast<float*>(memory[0].bytes);
    std::fill_n(y, count, NAN);
    int4_linear({x.data(), y, rows, matrix.weights()}, options);
    return {y, y + count};
}

inline std::vector<float> random_floats(int64_t count, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(random);
    return values;
}

// Whether the bits are equal, but that every NaN equals every other.
inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) ? !std::isnan(b[i]) : std::memcmp(&a[i], &b[i], sizeof a[i]) != 0) return false;
    }
    return true;
}

// A gate and an up matrix, interleaved by panels.
struct Int4GateUp {
    std::vector<Line> lines;
    Int4Weights weights;

    Int4GateUp(const Int4Matrix& gate, const Int4Matrix& up) : lines(2 * gate.lines.size()) {
        const auto panel = static_cast<size_t>(gate.shape.panel_bytes());
        for (size_t i = 0; i < static_cast<size_t>(gate.shape.panels()); ++i) {
            std::memcpy(lines[0].bytes + 2 * i * panel, gate.records() + i * panel, panel);
            std::memcpy(lines[0].bytes + (2 * i + 1) * panel, up.records() + i * panel, panel);
        }
        weights = {gate.shape, lines[0].bytes, 2 * gate.shape.bytes()};
    }
};

}  // namespace biomedgpt::testing
