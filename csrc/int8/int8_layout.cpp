// Between a matrix by rows and records.
#include <cstring>
#include <string>

#include "common/error.h"
#include "int8/int8.h"

namespace biomedgpt {
namespace {

constexpr int64_t kQuad = 4;
constexpr int64_t kQuadBytes = kQuad * kInt8PanelRows;
constexpr int64_t kFloat = sizeof(float);

// Where one row's quads, scale and bias lie in records.
struct Place {
    int64_t values;
    int64_t scale;
    int64_t bias;

    Place(const Int8Shape& shape, int64_t row) {
        const int64_t panel = row / kInt8PanelRows * shape.panel_bytes(), in_panel = row % kInt8PanelRows;
        values = panel + in_panel * kQuad;
        scale = panel + shape.value_bytes() + in_panel * kFloat;
        bias = scale + kInt8PanelRows * kFloat;
    }
};

int64_t quads_of(const Int8Shape& shape) {
    return (shape.columns + kQuad - 1) / kQuad;
}

int64_t bytes_of_quad(const Int8Shape& shape, int64_t quad) {
    const int64_t rest = shape.columns - quad * kQuad;
    return rest < kQuad ? rest : kQuad;
}

void pack_row(const Int8Shape& shape, const Int8Matrix& matrix, int64_t row, uint8_t* records) {
    const Place place(shape, row);
    const int8_t* values = matrix.values + row * shape.columns;
    for (int64_t quad = 0; quad < quads_of(shape); ++quad) {
        std::memcpy(records + place.values + quad * kQuadBytes, values + quad * kQuad,
                    static_cast<size_t>(bytes_of_quad(shape, quad)));
    }
    std::memcpy(records + place.scale, matrix.scales + row, kFloat);
    std::memcpy(records + place.bias, matrix.biases + row, kFloat);
}

void check_values(const Int8Shape& shape, const int8_t* values) {
    for (int64_t i = 0; i < shape.rows * shape.columns; ++i) {
        if (values[i] < -kInt8Largest) {
            throw ArgumentError("values", std::to_string(values[i]),
                                std::to_string(-kInt8Largest) + " to " + std::to_string(kInt8Largest));
        }
    }
}

}  // namespace

void int8_pack(const Int8Shape& shape, const Int8Matrix& matrix, uint8_t* records, const ParallelFor& parallel) {
    check_int8_shape(shape);
    check_values(shape, matrix.values);
    parallel(shape.panels(), [&](int64_t panel) {
        std::memset(records + panel * shape.panel_bytes(), 0, static_cast<size_t>(shape.panel_bytes()));
        const int64_t first = panel * kInt8PanelRows;
        const int64_t end = first + kInt8PanelRows < shape.rows ? first + kInt8PanelRows : shape.rows;
        for (int64_t row = first; row < end; ++row) pack_row(shape, matrix, row, records);
    });
}

void int8_unpack(const Int8Shape& shape, const uint8_t* records, int8_t* values, float* scales, float* biases,
                 const ParallelFor& parallel) {
    check_int8_shape(shape);
    parallel(shape.rows, [&](int64_t row) {
        const Place place(shape, row);
        for (int64_t quad = 0; quad < quads_of(shape); ++quad) {
            std::memcpy(values + row * shape.columns + quad * kQuad, records + place.values + quad * kQuadBytes,
                        static_cast<size_t>(bytes_of_quad(shape, quad)));
        }
        std::memcpy(scales + row, records + place.scale, kFloat);
        std::memcpy(biases + row, records + place.bias, kFloat);
    });
}

}  // namespace biomedgpt
