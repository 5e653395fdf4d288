// The parts of an int8 path that are alike for every instruction set, as templates over a description of it. In an
// unnamed namespace, and without standard containers and algorithms, for the reason that splice_kernel.h gives.
//
// An `Isa` has
//   kLanes               weight rows in a vector, 4, 8, 16 or 32
//   kPass                vectors of a panel that are summed at once
//   kTileRows            activation rows that are summed at once
//   kPlus128             whether weights are multiplied as bytes without a sign, 128 larger than they are
//   Ints                 a vector of kLanes sums
//   Weights              a vector of kLanes times four bytes, four columns of as many rows
//   Quad                 four bytes of an activation row, kLanes times
//   load(p), broadcast(p), dot(sums, w, q), set(int32), load_sums(p), store_sums(p, i)
#pragma once

#include <cstring>

#include "common/quantize.h"
#include "common/unroll.h"
#include "int8/int8_path.h"

namespace biomedgpt {
namespace {

constexpr int64_t kQuad = 4;                            // columns
constexpr int64_t kQuadBytes = kQuad * kInt8PanelRows;  // of a panel

template <class Isa, int kRows>
void multiply_rows(const Int8Tile& tile) {
    constexpr int kVectors = kInt8PanelRows / Isa::kLanes, kPass = Isa::kPass;
    static_assert(kVectors % kPass == 0);
    for (int first = 0; first < kVectors; first += kPass) {
        typename Isa::Ints sums[kRows][kPass];
        int32_t* totals = tile.totals + first * Isa::kLanes;
        BIOMEDGPT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kPass; ++v) {
                sums[r][v] = !tile.fresh ? Isa::load_sums(totals + r * kInt8PanelRows + v * Isa::kLanes)
                                         : Isa::set(Isa::kPlus128 ? tile.rows.zero_terms[r] : int32_t{0});
            }
        }
        const int8_t* weights = tile.weights + first * kQuad * Isa::kLanes;
        for (int64_t column = 0; column < tile.columns; column += kQuad, weights += kQuadBytes) {
            typename Isa::Weights of_quad[kPass];
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kPass; ++v) of_quad[v] = Isa::load(weights + v * kQuad * Isa::kLanes);
            BIOMEDGPT_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const typename Isa::Quad quad = Isa::broadcast(tile.rows.values + r * tile.rows.stride + column);
                BIOMEDGPT_UNROLL
                for (int v = 0; v < kPass; ++v) sums[r][v] = Isa::dot(sums[r][v], of_quad[v], quad);
            }
        }
        BIOMEDGPT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            BIOMEDGPT_UNROLL
            for (int v = 0; v < kPass; ++v) {
                Isa::store_sums(totals + r * kInt8PanelRows + v * Isa::kLanes, sums[r][v]);
            }
        }
    }
}

// Picks the instance for a number of rows, 1 to kRows.
template <class Isa, int kRows>
void multiply_up_to(const Int8Tile& tile, int64_t rows) {
    if (rows == kRows) return multiply_rows<Isa, kRows>(tile);
    if constexpr (kRows > 1) multiply_up_to<Isa, kRows - 1>(tile, rows);
}

inline void quantize(const float* x, int64_t columns, int64_t padded, int8_t* values, float* scale,
                     int32_t* zero_term) {
    constexpr int32_t kZeroPoint = 128;
    *zero_term = -kZeroPoint * quantize_bytes(x, columns, values, scale);
    std::memset(values + columns, 0, static_cast<size_t>(padded - columns));
}

// x Phi(x). Phi(x) - 1/2 is x times a rational function of x^2, fitted so that its largest error up to 5.5 is least
// (7e-9, by reweighted least squares); beyond, Phi is 0 or 1 to within a float's precision.
inline float gelu(float x) {
    constexpr float kEnd = 5.5f;
    float z = x < -kEnd ? -kEnd : x;
    z = z > kEnd ? kEnd : z;
    const float u = z * z;
    float p = 0x1.86dfb2p-26f;
    p = __builtin_fmaf(p, u, 0x1.aa409cp-18f);
    p = __builtin_fmaf(p, u, 0x1.61f4f4p-13f);
    p = __builtin_fmaf(p, u, 0x1.3282b4p-8f);
    p = __builtin_fmaf(p, u, 0x1.154906p-5f);
    p = __builtin_fmaf(p, u, 0x1.98845p-2f);
    float q = 0x1.41768p-20f;
    q = __builtin_fmaf(q, u, 0x1.34d5c8p-14f);
    q = __builtin_fmaf(q, u, 0x1.eded9p-10f);
    q = __builtin_fmaf(q, u, 0x1.d54ae6p-6f);
    q = __builtin_fmaf(q, u, 0x1.018c1cp-2f);
    q = __builtin_fmaf(q, u, 1.0f);
    return x * __builtin_fmaf(z, p / q, 0.5f);
}

// `columns` is a constant for whole panels, where nothing but vectors is moved.
inline __attribute__((always_inline)) void finish_row(const Int8Finish& of, int64_t row, int64_t columns) {
    const int32_t* totals = of.totals + row * kInt8PanelRows;
    const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
    float values[kInt8PanelRows];
    for (int64_t i = 0; i < kInt8PanelRows; ++i) {
        values[i] = __builtin_fmaf(static_cast<float>(totals[i]) * of.scales[i], of.row_scales[row], of.biases[i]);
    }
    if (of.gelu) {
        for (float& value : values) value = gelu(value);
    }
    if (of.residual != nullptr) {
        const float* residual = of.residual + row * of.stride;
        for (int64_t i = 0; i < columns; ++i) values[i] += residual[i];
    }
    std::memcpy(of.y + row * of.stride, values, bytes);
}

inline void finish(const Int8Finish& of, int64_t rows) {
    if (of.columns == kInt8PanelRows) {
        for (int64_t row = 0; row < rows; ++row) finish_row(of, row, kInt8PanelRows);
    } else {
        for (int64_t row = 0; row < rows; ++row) finish_row(of, row, of.columns);
    }
}

template <class Isa>
constexpr Int8Path int8_path(const char* name) {
    return {name, Isa::kTileRows, quantize, multiply_up_to<Isa, Isa::kTileRows>, finish};
}

}  // namespace
}  // namespace biomedgpt
