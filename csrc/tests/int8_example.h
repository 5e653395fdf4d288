// Matrices of eight-bit weights by rows and as records, and what int8 must make of them, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "int4_example.h"
#include "int8/int8.h"

namespace biomedgpt::testing {

struct Int8Example {
    Int8Shape shape;
    std::vector<int8_t> values;
    std::vector<float> scales, biases;
    std::vector<Line> lines;

    explicit Int8Example(const Int8Shape& of)
        : shape(of),
          values(static_cast<size_t>(of.rows * of.columns)),
          scales(static_cast<size_t>(of.rows)),
          biases(static_cast<size_t>(of.rows)),
          lines(static_cast<size_t>(of.bytes() / 64)) {}

    Int8Example(const Int8Shape& of, std::mt19937& random) : Int8Example(of) {
        std::uniform_real_distribution<float> uniform(-0.01f, 0.01f);
        for (int8_t& value : values) value = static_cast<int8_t>(static_cast<int>(random() % 255) - kInt8Largest);
        for (float& scale : scales) scale = uniform(random);
        for (float& bias : biases) bias = 100 * uniform(random);
        pack();
    }

    uint8_t* records() { return lines[0].bytes; }
    const uint8_t* records() const { return lines[0].bytes; }
    void pack() { int8_pack(shape, {values.data(), scales.data(), biases.data()}, records()); }
    int weight(int64_t row, int64_t column) const { return values[static_cast<size_t>(row * shape.columns + column)]; }
    Int8Weights weights() const { return {shape, records(), shape.bytes()}; }
};

// One row of activations, quantized by the book: as int4's, with one group.
struct Int8Reference {
    std::vector<int> values;
    float scale;

    Int8Reference(const float* x, int64_t columns) {
        const Int4Reference row(x, {1, columns, columns});
        values = row.values;
        scale = row.scales[0];
    }

    float times(const Int8Example& matrix, int64_t row) const {
        int32_t sum = 0;
        for (int64_t k = 0; k < matrix.shape.columns; ++k) {
            sum += values[static_cast<size_t>(k)] * matrix.weight(row, k);
        }
        const auto n = static_cast<size_t>(row);
        return std::fma(static_cast<float>(sum) * matrix.scales[n], scale, matrix.biases[n]);
    }
};

// All rows of a call by that reference.
inline std::vector<float> int8_reference(const std::vector<float>& x, int64_t rows, const Int8Example& matrix) {
    std::vector<float> y;
    for (int64_t m = 0; m < rows; ++m) {
        const Int8Reference row(x.data() + m * matrix.shape.columns, matrix.shape.columns);
        for (int64_t n = 0; n < matrix.shape.rows; ++n) y.push_back(row.times(matrix, n));
    }
    return y;
}

inline std::vector<float> int8_product(const std::vector<float>& x, int64_t rows, const Int8Example& matrix,
                                       const Int8Options& options) {
    std::vector<float> y(static_cast<size_t>(rows * matrix.shape.rows), NAN);
    Int8Args args;
    args.x = x.data();
    args.y = y.data();
    args.rows = rows;
    args.weights = matrix.weights();
    int8_linear(args, options);
    return y;
}

}  // namespace biomedgpt::testing
