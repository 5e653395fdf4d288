// int8: a linear layer with eight-bit weights and activations that are quantized to eight bits on the way, for
// encoders, which multiply each weight by hundreds of rows.
//
// y[m, n] = after(fma(float(sum over k of xq[m, k] * w[n, k]) * wscale[n], xscale[m], bias[n])) + residual[m, n]
//
// Weights are numbers -127 to 127 with a float32 scale per row. Activations are quantized per row, symmetrically, to
// -127 to 127 with a float32 scale. `after` is nothing or GELU, and a residual there may be or not. The inner sum is an
// integer and exact, and what follows is the same float32 arithmetic on every path, so that the same operands give the
// same bits for any number of rows, any other rows beside them, any number of threads and any path. (They do not where
// a process lets its processor flush subnormal numbers to zero.)
//
// Layout. Records [panels], one after another; a panel is 32 rows, and its record holds
//   - 32 * K bytes of values, K rounded up to a multiple of 64. Byte 4 * r + j of every 128 bytes holds column k + j of
//     row r, where k is 0, 4, 8, ... and j < 4;
//   - 32 float32 scales;
//   - 32 float32 biases.
// Any 64, 32 or 16 bytes of the values are operands of an instruction that adds dot products of four bytes to 32-bit
// sums, for 16, 8 or 4 rows; and 16 vectors of 64 bytes are a tile of a processor that has tiles. Rows beyond N in the
// last panel, and columns beyond K, are zeros. Records begin at an address that is a multiple of 64. A file should hold
// a matrix at a multiple of 4096 bytes, where it can be mapped.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/inline.h"
#include "common/parallel_for.h"

namespace biomedgpt {

constexpr int64_t kInt8PanelRows = 32;
constexpr int64_t kInt8ColumnStep = 64;
constexpr int64_t kInt8RecordAlignment = 64;
constexpr int kInt8Largest = 127;
// Of rows: what keeps products of sizes within 64 bits. Of columns: what keeps sums within 32.
constexpr int64_t kMaxInt8Rows = int64_t{1} << 24;
constexpr int64_t kMaxInt8Columns = int64_t{1} << 17;

struct Int8Shape {
    int64_t rows = 0;     // N, the width of what comes out
    int64_t columns = 0;  // K, the width of what goes in

    BIOMEDGPT_INLINE int64_t panels() const { return (rows + kInt8PanelRows - 1) / kInt8PanelRows; }
    BIOMEDGPT_INLINE int64_t padded_columns() const {
        return (columns + kInt8ColumnStep - 1) / kInt8ColumnStep * kInt8ColumnStep;
    }
    BIOMEDGPT_INLINE int64_t value_bytes() const { return kInt8PanelRows * padded_columns(); }
    BIOMEDGPT_INLINE int64_t panel_bytes() const { return value_bytes() + 2 * kInt8PanelRows * int64_t{sizeof(float)}; }
    BIOMEDGPT_INLINE int64_t bytes() const { return panels() * panel_bytes(); }
};

struct Int8Matrix {
    const int8_t* values = nullptr;  // [N, K], -127 to 127
    const float* scales = nullptr;   // [N]
    const float* biases = nullptr;   // [N]
};

// Throws ArgumentError for a shape that no weights have.
void check_int8_shape(const Int8Shape& shape);

// Into records [shape.bytes()], at any address, and back bit for bit. Packing throws ArgumentError, with nothing
// written, where a value is -128.
void int8_pack(const Int8Shape& shape, const Int8Matrix& matrix, uint8_t* records, const ParallelFor& parallel = {});
void int8_unpack(const Int8Shape& shape, const uint8_t* records, int8_t* values, float* scales, float* biases,
                 const ParallelFor& parallel = {});

struct Int8Weights {
    Int8Shape shape;
    const uint8_t* records = nullptr;
    int64_t bytes = 0;  // shape.bytes()
};

struct Int8Args {
    const float* x = nullptr;  // [rows, K], contiguous
    float* y = nullptr;        // [rows, N], contiguous; apart from all else
    int64_t rows = 0;
    Int8Weights weights;
    bool gelu = false;                // x Phi(x), off by at most 2^-22 of |x|
    const float* residual = nullptr;  // [rows, N], contiguous, or none
};

struct Int8Options {
    ParallelFor parallel;
    std::string_view path = "auto";  // or one of int8_paths()
};

// Checks, then writes; throws ArgumentError. A thread allocates in its first call, and when a call needs a larger
// workspace than all before it. A row of x with an infinity or a NaN makes the row of y NaN and no other.
void int8_linear(const Int8Args& args, const Int8Options& options = {});

struct Int8Activations {
    int8_t* values = nullptr;  // [rows, K rounded up], -127 to 127, zero beyond K
    // [rows]: the largest magnitude / 127, but 0 where that magnitude is below 2^-119 and NaN where it is not finite;
    // values are zeros then.
    float* scales = nullptr;
};

// How the op quantizes x float32 [rows, columns]: values to nearest, ties to even.
void int8_quantize(const float* x, int64_t rows, int64_t columns, const Int8Activations& activations,
                   std::string_view path = "auto");

// The instruction-set paths this machine can run, best first; "auto" takes the first. All give the same bits.
std::vector<const char*> int8_paths();

}  // namespace biomedgpt
